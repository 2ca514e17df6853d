"""The gateway's side of the bus: takes heartbeats in, sends its own, and notes when the bus is away."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import anyio

from stella_gateway.board import Board
from stella_shared import config, lifecycle, metrics, subjects
from stella_shared.bus import Bus
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotPermitted, TryAgain
from stella_shared.wire import Beat

_AGAIN_SECONDS: Final = 1.0
#: A connection attempt that takes longer than this is told as a failure, and made anew.
_PATIENCE_SECONDS: Final = 3.0
_MEASURE_SECONDS: Final = 2.0
_QUEUES: Final = (
    ("raw", subjects.RAW_STREAM, subjects.RAW_DURABLE),
    ("enriched", subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE),
)


async def follow(
    signals: Signals, board: Board, waiting: dict[str, float], make_beat: Callable[[], Beat], stop: anyio.Event
) -> None:
    """Keep `board` and `waiting`, the metrics of what waits on the bus, fed until `stop` is set.

    A bus that is away is noted on the board and tried again.
    """
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
                    tasks.start_soon(_measure, bus, waiting)
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


async def _measure(bus: Bus, waiting: dict[str, float]) -> None:
    """Note how much waits in each stream; asked of the bus, as whoever should work it off may hang."""
    while True:
        for name, stream, durable in _QUEUES:
            key = metrics.key(metrics.BUS_WAITING_BYTES, stream=name)
            try:
                waiting[key] = float((await bus.lag(stream, durable)).bytes)
            except TryAgain:
                waiting.pop(key, None)  # not known is not nothing
        await anyio.sleep(_MEASURE_SECONDS)
