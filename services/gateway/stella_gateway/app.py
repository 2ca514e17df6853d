"""The gateway: heartbeats in, answers out.

bus ──listener──> board ──web──> /health /status /metrics / ──server──> HTTP
"""

from __future__ import annotations

import os
import time
from functools import partial

import anyio

from stella_gateway import access, listener, server, web
from stella_gateway.board import Board
from stella_shared import VERSION, config, lifecycle, log, privileges
from stella_shared.config import Signals
from stella_shared.wire import Beat


async def run(signals: Signals, instance: str = "") -> None:
    """Serve until SIGTERM or SIGINT.

    Raises `ConfigError` or `NotPermitted` before anything is served when address, port or token cannot do.
    """
    logger = log.setup("gateway", signals.logging)
    node = config.node_name(signals)
    address, port = signals.metrics.address, signals.metrics.port
    token = access.read_token(signals.metrics.token_file, address)
    board = Board(node, {"collector": 1, "enricher": signals.enrichers, "signer": 1}, time.monotonic())
    started_at = time.time()
    waiting: dict[str, float] = {}
    make_beat = partial(_beat, instance or node, node, started_at, f"http://{address}:{port}", waiting)
    with server.listen(address, port) as sock, lifecycle.stop_event() as stop:
        logger.info("listening on http://%s:%s", address, port)
        application = web.make_app(board, token=token, version=VERSION, started_at=started_at)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.follow, signals, board, waiting, make_beat, stop)
            tasks.start_soon(_tick, board)
            await server.serve(application, sock, stop)
            # A last heartbeat may still be on its way.
            await anyio.sleep(0.2)
            tasks.cancel_scope.cancel()
    logger.info("stopped")


async def _tick(board: Board) -> None:
    while True:
        board.tick(time.monotonic())
        # It answers, whether the bus is there or not.
        lifecycle.show("ok")
        await anyio.sleep(lifecycle.BEAT_SECONDS)


def _beat(instance: str, node: str, started_at: float, url: str, waiting: dict[str, float]) -> Beat:
    return Beat(
        service="gateway",
        instance=instance,
        node=node,
        pid=os.getpid(),
        version=VERSION,
        at=time.time(),
        started_at=started_at,
        state="ok",
        metrics=dict(waiting),
        detail={"url": url, "privileges": privileges.left()},
    )
