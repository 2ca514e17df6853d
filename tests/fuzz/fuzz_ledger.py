"""Ledgers, chain manifests, heads and lines: every value of their form can be judged, and none ends in a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stella_shared.errors import StellaError
from stella_shared.evidence import canonical, names, records, statement
from stella_shared.evidence.lines import LineChecker, Reader
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
        checker.check([b"{}"])
        checker.finish()
        try:
            statement.encode(statement.build(read, "0" * 64, context))
        except StellaError:
            return

    def lines(data: bytes) -> None:
        reader, checker = Reader(), LineChecker(real, "node-a")
        try:
            for at in range(0, len(data), 4096):
                checker.check(reader.take(data[at : at + 4096]))
        except ValueError:
            return
        reader.digest()
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
