"""The resolver as a process of its own, for whoever is not the enricher: questions in, answers out, in order.

    python -m stella_enricher.symbols [--store DIR] [--store-max-mb N] [--debug-directory DIR]...
                                      [--system-debug-directory DIR]... [--debuginfod URL]...

Folders given by --debug-directory are searched through whatever their layout; system ones by build-id alone.

Reads one JSON `Question` a line and writes one JSON `Frame` a line, both of `stella_shared.symbols`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from stella_enricher.symbols import debuginfod
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.resolver import Resolver
from stella_enricher.symbols.store import Store
from stella_shared.symbols import Question


def main() -> int:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path)
    parser.add_argument("--store-max-mb", type=int, default=256)
    parser.add_argument("--debug-directory", type=Path, action="append", default=[])
    parser.add_argument("--system-debug-directory", type=Path, action="append", default=[])
    parser.add_argument("--debuginfod", action="append", default=[])
    options = parser.parse_args()
    urls = options.debuginfod
    resolver = Resolver(
        Finder([*options.debug_directory, *options.system_debug_directory], scan=options.debug_directory),
        Store(options.store, options.store_max_mb << 20) if options.store else None,
        max_answers=100_000,
        max_table_bytes=256 << 20,
        fetch=(lambda build_id, kind: debuginfod.fetch(urls, build_id, kind)) if urls else None,
    )
    questions = msgspec.json.Decoder(Question)
    for line in sys.stdin.buffer:
        answer = resolver.resolve_now(questions.decode(line))
        sys.stdout.buffer.write(msgspec.json.encode(answer, order="sorted") + b"\n")
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
