"""`make bench`: what a whole node holds and costs, and its peers beside it; the figures of docs/performance.md.

    rates     opens at rising rates: lost, latency, CPU by process          --rates, --seconds, --runs
    compare   an unthrottled program, recorded by nobody, us and the peers  --runs
    idle      a node with nothing to record                                 --idle-seconds
    mixed     opens, execs, connections and TLS of 200 processes            --mixed, --seconds, --runs

Every run has a fresh node with everything on, the generator on the same machine.  After each the chain is verified,
the identity of its ledgers with it, and the lines of what was made are counted.  The exit code is 1 when a run
failed or did not add up; losses that are accounted for are figures.  Runs are made in rounds, so that what disturbs
the machine falls on all.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from tests.bench import compare, idle, machine, mixed, plot, rates, tables
from tests.system.node import build_generator

KINDS = ("rates", "compare", "idle", "mixed")
RATES = [100_000, 200_000, 300_000, 400_000, 500_000, 700_000, 1_000_000]
QUICK_RATES = [100_000, 300_000, 500_000]
MIXED = [100_000, 150_000, 300_000]
QUICK_MIXED = [100_000]


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; without one, all")
    parser.add_argument("--quick", action="store_true", help="a short look: 1 run of 5 s, three rates, small counts")
    parser.add_argument("--rates", type=int, nargs="+", help="opens a second to ask for")
    parser.add_argument("--mixed", type=int, nargs="+", help="events a second of the mixed load to ask for")
    parser.add_argument("--seconds", type=float, help="of each run (30)")
    parser.add_argument("--runs", type=int, help="of each figure (3)")
    parser.add_argument("--idle-seconds", type=float, help="how long an idle node is watched (30)")
    parser.add_argument("--recorders", nargs="+", choices=list(compare.RECORDERS), help="of compare; without, all")
    parser.add_argument("--producers", type=int, default=1, help="programs that share each rate (1)")
    parser.add_argument("--ring", type=int, default=8 << 20, help="ring buffer size in bytes (8 MiB)")
    parser.add_argument("--enrichers", type=int, default=1)
    parser.add_argument("--touch-gib", type=int, default=6, help="memory to use once before measuring; 0: none (6)")
    parser.add_argument("--json", type=Path, help="write all figures here; what is there of other kinds stays")
    parser.add_argument("--docs", type=Path, help="put tables into this document, the plot as .svg beside it")
    parser.add_argument("--render", action="store_true", help="measure nothing: tables and plot of --json as it is")
    args = parser.parse_args(words)
    told = re.sub(r" --(json|docs) \S+", "", " ".join(["", *(sys.argv[1:] if words is None else words)]))
    args.command = f"python -m tests.bench{told}"
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: no such kind; there are {', '.join(KINDS)}")
    if args.render and not (args.json and args.json.exists()):
        parser.error("--render needs the figures of an earlier run: --json FILE")
    if args.docs and not args.docs.exists():
        parser.error(f"--docs {args.docs}: there is no such document to put figures into")
    args.kinds = args.kinds or list(KINDS)
    quick = args.quick
    args.rates = args.rates or (QUICK_RATES if quick else RATES)
    args.mixed = args.mixed or (QUICK_MIXED if quick else MIXED)
    args.seconds = args.seconds or (5.0 if quick else 30.0)
    args.runs = args.runs or (1 if quick else 3)
    args.idle_seconds = args.idle_seconds or (10.0 if quick else 30.0)
    args.recorders = args.recorders or list(compare.RECORDERS)
    return args


def _runs(program: Path, kind: str, args: argparse.Namespace) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield each run of a kind, round by round."""
    if kind == "idle":
        yield partial(idle.run, args.idle_seconds, settle=min(15.0, args.idle_seconds))
        return
    for number in range(args.runs):
        runs: list[Callable[[], dict[str, Any]]]
        if kind == "rates":
            common = (args.seconds, args.ring, args.enrichers)
            runs = [partial(rates.run, program, rate, *common, producers=args.producers) for rate in args.rates]
        elif kind == "compare":
            scale = 0.3 if args.quick else 1.0
            runs = [partial(compare.run, program, name, args.ring, scale) for name in args.recorders]
        else:
            plans = [mixed.Plan(events, args.seconds) for events in args.mixed]
            runs = [partial(mixed.run, plan, args.ring, args.enrichers) for plan in plans]
        for run in runs:
            yield partial(_of_round, number, run)


def _of_round(number: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {"round": number, **run()}


def measure(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Put all figures that were asked for into `results`; return which runs failed, and why.

    One that fails does not end the others: the whole takes the better part of an hour.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="stella-gen-") as name:
        program = build_generator(Path(name))
        results["machine"] = machine.facts(program, args.touch_gib)
        server = Path(sys.executable).parent / "nats-server"
        results["machine"]["nats_server"] = machine.version(str(server), "--version").replace(": v", " ")
        results["versions"] = compare.versions()
        for kind in args.kinds:
            rows = []
            for run in _runs(program, kind, args):
                try:
                    row = run()
                except Exception as e:
                    failed.append(f"{kind}: {type(e).__name__}: {e}")
                    print(failed[-1], file=sys.stderr, flush=True)
                    continue
                rows.append(row)
                print(f"{kind}: {json.dumps(row)}", file=sys.stderr, flush=True)
            results[kind] = rows[0] if rows and kind == "idle" else rows
            told = results["machine"]
            results.setdefault("taken", {})[kind] = (
                f"{told['date']}, by `{args.command}`; one open and close took {told['bare_open_ns']:,} ns bare."
            )
            if args.json:
                args.json.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    return failed


def put_into(document: Path, sections: dict[str, str]) -> None:
    """Replace what stands between `<!-- bench NAME -->` and `<!-- /bench -->` by the section of that name."""

    def new(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{sections[found[2]]}\n\n{found[3]}" if found[2] in sections else found[0]

    marked = re.compile(r"(<!-- bench (\w+) -->)\n.*?\n(<!-- /bench -->)", re.S)
    document.write_text(marked.sub(new, document.read_text()))


def main(words: list[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(words)
    results: dict[str, Any] = {}
    if args.json and args.json.exists():
        results = msgspec.json.decode(args.json.read_bytes())
    failed = [] if args.render else measure(args, results)
    sections = tables.sections(results)
    for name, text in sections.items():
        if args.render or name in ("machine", *args.kinds):
            print(f"\n## {name}\n\n{text}")
    if args.docs:
        put_into(args.docs, sections)
        if results.get("rates"):
            told = results["machine"]
            about = f"{told['processor']}, {told['cores']} cores, Linux {told['kernel']}, {told['date']}"
            plot.draw(results["rates"], args.docs.with_suffix(".svg"), about)
    for text in failed:
        print(f"\nfailed: {text}")
    checked = [row for kind in ("rates", "mixed") for row in results.get(kind, [])]
    return 0 if not failed and all(row["exact"] for row in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
