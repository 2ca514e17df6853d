"""How a service begins to stop, and how it shows that it lives: on the bus, to systemd, and to a container engine.

A manager that waits hears `READY=1` when the service first works, `WATCHDOG=1` once a second while its event
loop turns, and `STOPPING=1` at the signal (sd_notify(3), over the datagram socket in $NOTIFY_SOCKET).  An
engine's health check looks at the file that $STELLA_HEALTH_FILE names: it is there, and newly written, while
the service works.  Neither can stop a service: what cannot be told is left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

if TYPE_CHECKING:
    from stella_shared.bus import Bus
    from stella_shared.wire import Beat

BEAT_SECONDS: Final = 1.0
HEALTH_FILE: Final = "STELLA_HEALTH_FILE"
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_WORKING: Final = ("ok", "degraded")
_STATUS_MAX: Final = 500
_ready: set[str] = set()


@contextmanager
def stop_event() -> Iterator[anyio.Event]:
    """Give an event that is set on the first SIGTERM or SIGINT, and stays set.

    Further signals change nothing: a terminal and a supervisor often both send one, and what is in flight
    must still be finished.  Works in the main thread's event loop; the former handling comes back at the end.
    """
    stop = anyio.Event()
    loop = asyncio.get_running_loop()
    former = {number: signal.getsignal(number) for number in _SIGNALS}

    def begin() -> None:
        if not stop.is_set():
            notify("STOPPING=1")
        stop.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, begin)
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
        beat = make_beat()
        await bus.beat(beat)
        show(beat.state, beat.reason)
        due = max(due + BEAT_SECONDS, anyio.current_time())
        with anyio.CancelScope(deadline=due):
            await stop.wait()
    await bus.beat(msgspec.structs.replace(make_beat(), state="stopping"))


def show(state: str, reason: str = "") -> None:
    """Tell the manager and the health file that the event loop turns, and how the service is.

    Called about once a second.  A service that has failed still turns: it is unhealthy, and no reason for the
    manager to kill it, since most of what fails it (a full disk, a bus that is away) a new start does not cure.
    """
    working = state in _WORKING
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        words = ["WATCHDOG=1", f"STATUS={state}{f': {reason}' if reason else ''}"[:_STATUS_MAX].replace("\n", " ")]
        if working and address not in _ready:
            _ready.add(address)
            words.insert(0, "READY=1")
        notify("\n".join(words))
    if path := os.environ.get(HEALTH_FILE, ""):
        with suppress(OSError):
            if working:
                Path(path).write_text(f"{state}\n", encoding="ascii")
            else:
                Path(path).unlink(missing_ok=True)


def notify(message: str) -> None:
    """Send one message to the manager that waits at $NOTIFY_SOCKET; without one, do nothing.  Never blocks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as to:
            # A name that begins with @ is in the abstract namespace (unix(7)).
            to.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)
