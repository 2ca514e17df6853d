"""`make bench-redaction`: what one program start costs the line builder, with redaction and without; and one open.

Each figure is the best of several batches, in CPU time of this process.  *new* command lines are all different;
*again* is one command line over and over, which is remembered.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from stella_enricher.containers import HOST
from stella_enricher.lines import CLines
from stella_enricher.redaction import REMEMBERED_MAX, Redactor
from stella_shared.patterns import PathFilter
from stella_shared.wire import RawBatch
from tests.enricher.record_maker import batch, file_open, process_exec, record

STARTS = 400
OPENS = 20_000
BATCHES = 15
COMMANDS = {
    "`ls`, 2 arguments": ["ls", "-la", "/etc/nginx"],
    "`cc`, 7 arguments": ["cc", "-O2", "-Wall", "-I/usr/include", "-c", "main.c", "-o", "main.o"],
    "`sh -c`, a script of 56 letters": ["sh", "-c", "cd /srv/app && make -j4 all 2>&1 | tail -20; echo finished"],
    "`curl` with three secrets": ["curl", "-sSu", "user:hunter2", "https://u:hunter2@example.com/x?token=abc"],
    "`java`, 2,048 bytes": ["java", *(f"-Dsome.property.{i}=value{i}" for i in range(80))],
}


def starts(argv: list[str], first: int, new: bool) -> RawBatch:
    """Return a batch of `STARTS` starts of a program, each of another process."""
    out = []
    for i in range(STARTS):
        words = [*argv[:1], str(first + i), *argv[1:]] if new else argv
        raw = b"".join(word.encode() + b"\0" for word in words)[:2048]
        body = process_exec(f"/usr/bin/{argv[0]}".encode(), b"", raw, total=len(raw), start_ns=first + i)
        out.append(record(2, 3, body, seq=i))
    return batch(b"".join(out), {0: STARTS})


def best(redactor: Redactor, make: Callable[[int], RawBatch], count: int) -> float:
    """Return the least time for one event of a batch, in µs."""
    lines = CLines(PathFilter([], []), redactor)
    times = []
    for i in range(BATCHES):
        raw = make(1 + i * count)
        begin = time.process_time()
        lines.build(raw, lambda _: HOST)
        times.append((time.process_time() - begin) / count * 1e6)
    return min(times[1:])


def main() -> int:
    """Measure, and print a table."""
    assert STARTS * 2 < REMEMBERED_MAX
    print("| event | redaction off, µs | new, µs | again, µs |\n|---|---|---|---|")
    for name, argv in COMMANDS.items():
        off = best(Redactor(enabled=False), lambda first, argv=argv: starts(argv, first, new=True), STARTS)  # type: ignore[misc]
        new = best(Redactor(), lambda first, argv=argv: starts(argv, first, new=True), STARTS)  # type: ignore[misc]
        again = best(Redactor(), lambda first, argv=argv: starts(argv, first, new=False), STARTS)  # type: ignore[misc]
        print(f"| {name} | {off:.1f} | {new:.1f} | {again:.1f} |")
    opens = b"".join(record(1, 1, file_open(b"/etc/%d" % (i % 64)), seq=i, ts=i) for i in range(OPENS))
    raw = batch(opens, {0: OPENS})
    off = best(Redactor(enabled=False), lambda _: raw, OPENS)
    on = best(Redactor(), lambda _: raw, OPENS)
    print(f"| an open | {off:.3f} | {on:.3f} | {on:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
