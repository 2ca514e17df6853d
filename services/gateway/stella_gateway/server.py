"""The listening socket and uvicorn inside our task group."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from typing import Final

import anyio
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from stella_shared.errors import ConfigError, NotPermitted

GRACE_SECONDS: Final = 3
_BACKLOG: Final = 128
_CONNECTIONS: Final = 64
_HEAD_MAX_BYTES: Final = 16384
#: A connection on which no whole request head comes in this time is closed: idle ones would keep others out.
HEAD_SECONDS: Final = 5.0
TICK_SECONDS: Final = 1.0


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens on `address:port`.  Raises `ConfigError` or `NotPermitted`."""
    host = "127.0.0.1" if address == "localhost" else address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as e:
        sock.close()
        said = f"the gateway cannot listen on {address}:{port}: {e.strerror}"
        if e.errno in (errno.EACCES, errno.EPERM):
            raise NotPermitted(said, hint="choose a signals.metrics.port of 1024 or more") from None
        raise ConfigError(said, hint="set signals.metrics.port to a free port") from None
    return sock


class _Impatient(H11Protocol):
    """uvicorn's protocol, which by itself waits for a request's head for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        if not self.transport.is_closing():
            self._wait_for_a_head()
        super().on_response_complete()

    def _wait_for_a_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """uvicorn that leaves the process's signals alone, for the service has its own handling, and sleeps when idle.

    By itself it wakes ten times a second to see whether it should end; here that is told, and what is left to do
    at times is the `Date` of its answers.
    """

    def __init__(self, config: uvicorn.Config, stop: anyio.Event) -> None:
        super().__init__(config)
        self._stop = stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        while not self._stop.is_set():
            await self.on_tick(0)
            with anyio.move_on_after(TICK_SECONDS):
                await self._stop.wait()
        self.should_exit = True


async def serve(app: FastAPI, sock: socket.socket, stop: anyio.Event) -> None:
    """Answer requests on `sock` until `stop` is set; what is being answered then is finished."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http=_Impatient,
        ws="none",
        # A header must not be able to make a stranger look like loopback.
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_MAX_BYTES,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    await _Server(config, stop).serve(sockets=[sock])
