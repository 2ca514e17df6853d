"""Decides when something is waited for no longer.  Pure: the time is handed in.

A batch that later ones of its run wait for has `WAIT_SECONDS` to come.  A run that another one has followed
has as long after its last sign of life.  Both allow for an enricher that died with a batch in its hands: the
bus gives that batch to another one.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from stella_signer.account import Account
from stella_signer.steps import Finish, GiveUp, Step

WAIT_SECONDS: Final = 60.0
#: More batches than this waiting for one: memory comes before patience.
MAX_EARLY: Final = 1 << 16


class Patience:
    """Remembers since when the same thing is waited for."""

    def __init__(self, wait_seconds: float = WAIT_SECONDS) -> None:
        self._wait_seconds = wait_seconds
        self._since: dict[Hashable, float] = {}

    def due(self, account: Account, now: float) -> list[Step]:
        """Return the steps that end what has been waited for too long."""
        waits: dict[Hashable, Step] = {}
        for run, (number, lowest) in account.holes().items():
            waits["hole", run, number] = GiveUp(run, lowest)
        for run in account.superseded():
            waits["end", run, account.progress(run)] = Finish(run)
        self._since = {what: self._since.get(what, now) for what in waits}
        crowded = account.early() > MAX_EARLY
        return [
            step
            for what, step in waits.items()
            if now - self._since[what] >= self._wait_seconds or (crowded and isinstance(step, GiveUp))
        ]


def at_the_end(account: Account) -> list[Step]:
    """Return the steps that leave nothing waiting, for a chunk that must close now.

    Runs that another one has followed end only when nothing more is expected of any run; otherwise they
    are carried into the next chunk.
    """
    steps: list[Step] = [GiveUp(run, lowest) for run, (_, lowest) in account.holes().items()]
    if not steps and not account.live():
        steps = [Finish(run) for run in account.superseded()]
    return steps
