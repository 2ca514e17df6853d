"""The gateway's side of the bus: takes heartbeats in, sends its own, and notes when the bus is away."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import anyio

from stella_gateway.board import Board
from stella_shared import config, lifecycle
from stella_shared.bus import Bus
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotPermitted, TryAgain
from stella_shared.wire import Beat

_AGAIN_SECONDS: Final = 1.0
#: A connection attempt that takes longer than this is told as a failure, and made anew.
_PATIENCE_SECONDS: Final = 3.0


async def follow(signals: Signals, board: Board, make_beat: Callable[[], Beat], stop: anyio.Event) -> None:
    """Keep `board` fed until `stop` is set.  A bus that is away is noted on the board and tried again."""
    url = config.bus_url(signals)
    while not stop.is_set():
        try:
            account = config.bus_user(signals, "gateway")
            with anyio.move_on_after(_PATIENCE_SECONDS) as patience:
                async with (
                    Bus.connect(url, name="gateway", account=account, tls=signals.bus.tls, patience_seconds=0.0) as bus,
                    anyio.create_task_group() as tasks,
                ):
                    patience.deadline = math.inf
                    tasks.start_soon(_listen, bus, board)
                    tasks.start_soon(_watch, bus, board)
                    await lifecycle.beating(bus, make_beat, stop)
                    tasks.cancel_scope.cancel()
            if patience.cancelled_caught:
                raise TryAgain(f"no NATS server answers at {url}")
        except (TryAgain, NotPermitted, ConfigError) as e:
            board.bus_is("failed", str(e))
            with anyio.move_on_after(_AGAIN_SECONDS):
                await stop.wait()


async def _listen(bus: Bus, board: Board) -> None:
    async for beat in bus.beats():
        board.hear(beat, time.monotonic())


async def _watch(bus: Bus, board: Board) -> None:
    while True:
        try:
            if not bus.connected:
                raise TryAgain("the connection to the NATS server is lost; trying again")
            with anyio.fail_after(_PATIENCE_SECONDS):
                await bus.ping()
            board.bus_is("ok")
        except (TryAgain, TimeoutError) as e:
            board.bus_is("failed", str(e) or "the NATS server does not answer")
        await anyio.sleep(_AGAIN_SECONDS)
