"""A collector that kills itself at a chosen step: `python -m tests.collector.crash_driver STEP TIMES --config …`.

It dies, as of `kill -9`, at the TIMES-th passing of the step.  The steps are those between which something has
happened that outlives the process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

from stella_collector import entry
from stella_collector.draining import Draining
from stella_collector.journal import Journal
from stella_collector.ring import CRing
from stella_collector.runs import Runs
from stella_collector.spool import Spool
from stella_shared.bus import Bus

#: Steps of a collector that works, in their order, and of one that goes on with a run.
WORKING: Final = (
    "read", "entry written", "state half written", "written", "in the spool", "sent", "stored", "acked", "released",
)  # fmt: skip
GOING_ON: Final = ("taken over", "recovered", "read again", "in the spool", "stored")
_left = 0


def die() -> None:
    """Die at once, if it is time."""
    global _left
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: type[Any], name: str) -> None:
    """Have `owner.name` die before it does anything."""
    former: Callable[..., Any] = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        die()
        return former(*args, **kwargs)

    setattr(owner, name, dies)


def after(owner: type[Any], name: str) -> None:
    """Have `owner.name` die once it is done."""
    former: Callable[..., Any] = getattr(owner, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        result = former(*args, **kwargs)
        die()
        return result

    setattr(owner, name, dies)


def tear_state() -> None:
    """Have the books half written."""

    def torn(self: Journal) -> None:
        if _left > 1:
            die()
            whole(self)
            return
        memory = self._memory
        before = memory[: 2 * self._slot]
        whole(self)
        after = memory[: 2 * self._slot]
        differs = [at for at in range(len(after)) if after[at] != before[at]]
        # The sum at the front is written last: half of the books are new, it is not.
        half = differs[len(differs) // 2]
        memory[: 2 * self._slot] = before[: differs[0] + 8] + after[differs[0] + 8 : half] + before[half:]
        die()

    whole = Journal._write_state
    Journal._write_state = torn  # type: ignore[method-assign]


def send_and_die() -> None:
    """Have a batch sent, and no answer waited for."""

    async def publish(self: Bus, subject: str, data: bytes, *, msg_id: str, **_: Any) -> None:
        if _left > 1:
            die()
            await whole(self, subject, data, msg_id=msg_id)
            return
        await self._nc.publish(subject, data, headers={"Nats-Msg-Id": msg_id})
        await self._nc.flush()
        die()

    whole = Bus.publish
    Bus.publish = publish  # type: ignore[method-assign,assignment]


def store_and_die() -> None:
    """Have a batch stored, and nothing done about it."""

    async def publish(self: Bus, subject: str, data: bytes, **kwargs: Any) -> None:
        await whole(self, subject, data, **kwargs)
        die()

    whole = Bus.publish
    Bus.publish = publish  # type: ignore[method-assign]


STEPS: Final[dict[str, Callable[[], None]]] = {
    "read": lambda: before(Journal, "write"),
    "entry written": lambda: before(Journal, "_write_state"),
    "state half written": tear_state,
    "written": lambda: after(Journal, "write"),
    "in the spool": lambda: after(Spool, "put"),
    "sent": send_and_die,
    "stored": store_and_die,
    "acked": lambda: before(CRing, "release"),
    "released": lambda: after(CRing, "release"),
    "taken over": lambda: after(Runs, "take"),
    "recovered": lambda: after(Journal, "recover"),
    "read again": lambda: after(CRing, "again"),
    "attached": lambda: before(Draining, "drain"),
}


def main() -> int:
    """Run a collector that dies."""
    global _left
    step, times = sys.argv[1], sys.argv[2]
    del sys.argv[1:3]
    _left = int(times)
    STEPS[step]()
    return entry.main()


if __name__ == "__main__":
    sys.exit(main())
