"""What happens to a chunk's accounting, as values: the journal stores them, `account` applies them.

Live and after a crash, the same steps in the same order lead to the same ledger.
"""

from __future__ import annotations

import msgspec

from stella_shared.wire import Closing, Ledger


class Settle(msgspec.Struct, frozen=True, array_like=True, tag="settle"):
    """A complete batch: its lines stand in the chunk, its head is told here.

    Batches of a run may come in any order; their numbers are settled in the order of the run.
    """

    boot_id: str
    run: str
    number: int
    lines: int
    ledger: Ledger
    coverage: str
    final: bool
    closings: list[Closing]


class GiveUp(msgspec.Struct, frozen=True, array_like=True, tag="give_up"):
    """Batches of `run` before number `before` that are not here yet are waited for no longer: lost, `bus`."""

    run: str
    before: int


class Finish(msgspec.Struct, frozen=True, array_like=True, tag="finish"):
    """Nothing more of `run` is waited for: it ends here, by its closing if there is one."""

    run: str


Step = Settle | GiveUp | Finish
