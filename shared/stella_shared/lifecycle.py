"""How a service begins to stop, and how it shows that it lives."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

if TYPE_CHECKING:
    from stella_shared.bus import Bus
    from stella_shared.wire import Beat

BEAT_SECONDS: Final = 1.0
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_event() -> Iterator[anyio.Event]:
    """Give an event that is set on the first SIGTERM or SIGINT, and stays set.

    Further signals change nothing: a terminal and a supervisor often both send one, and what is in flight
    must still be finished.  Works in the main thread's event loop; the former handling comes back at the end.
    """
    stop = anyio.Event()
    loop = asyncio.get_running_loop()
    former = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number, handler in former.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def until_signalled(cancel: anyio.CancelScope) -> None:
    """Wait for SIGTERM or SIGINT, then cancel `cancel`."""
    with stop_event() as stop:
        await stop.wait()
    cancel.cancel("signalled to stop")


async def beating(bus: Bus, make_beat: Callable[[], Beat], stop: anyio.Event) -> None:
    """Send `make_beat()` once a second until `stop` is set, then one last beat whose state is `stopping`.

    A service that goes on working while it drains passes an event of its own, set when the draining is over:
    a part that falls silent for a few seconds counts as failed.
    """
    due = anyio.current_time()
    while not stop.is_set():
        await bus.beat(make_beat())
        due = max(due + BEAT_SECONDS, anyio.current_time())
        with anyio.CancelScope(deadline=due):
            await stop.wait()
    await bus.beat(msgspec.structs.replace(make_beat(), state="stopping"))
