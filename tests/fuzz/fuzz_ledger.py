"""Ledgers, chain manifests, heads and lines: every value of their form can be judged, and none ends in a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stella_shared.errors import StellaError
from stella_shared.evidence import canonical, names, records, statement
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.compressed import pack
from stella_shared.evidence.lines import LineChecker
from stella_shared.evidence.records import Chain, Head, Ledger
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    known = Known(folder, "v2")
    real = canonical.loads(known.file(2, names.LEDGER), Ledger)
    standing = records.standing_after(real.runs, real.ended_runs)
    context = statement.Context("node-a", "0" * 64, None, None, "0")

    def ledger(data: bytes) -> None:
        try:
            read = canonical.loads(data, Ledger)
        except ValueError:
            return
        records.accounting(read)
        records.identity_faults(read)
        records.continuity_faults(standing, read, may_pick_up=False)
        records.standing_after(read.runs, read.ended_runs)
        checker = LineChecker(read, "node-a")
        checker.judge(1, b"{}")
        checker.finish()
        try:
            statement.encode(statement.build(read, "0" * 64, context))
        except StellaError:
            return

    place = folder / "lines.ndjson.zst"

    def lines(data: bytes) -> None:
        # Half of the inputs are lines, half are what a file holds.
        place.write_bytes(pack(data) if len(data) % 2 else data)
        checker = LineChecker(real, "node-a")
        with ChunkReader() as reader:
            try:
                reader.read(place, checker, lambda size: None)
            except ValueError:
                return
        checker.finish()

    def one(data: bytes) -> None:
        ledger(data)
        lines(data)
        for kind in (Chain, Head):
            try:
                canonical.loads(data, kind)
            except ValueError:
                continue

    return one
