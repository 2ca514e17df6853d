"""The way to the bus: a bounded spool of encoded batches, published with acks, several at a time.

Nothing here ever waits on the kernel side.  When the bus is slow the spool fills; when it is full the
collector stops draining, the ring fills, and the kernel's own numbers say what was lost: `ring_full`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable

import anyio

from stella_shared.bus import Bus
from stella_shared.errors import TryAgain

log = logging.getLogger(__name__)

#: Publishing several at once hides the bus's latency; the signer puts batches back in order.
PARALLEL = 4
SPOOL_BYTES = 64 << 20
_RETRY_SECONDS = (0.05, 1.0)


class Spool:
    """Encoded batches on their way.  `put` from one task, `run` in another."""

    def __init__(self, bus: Bus, subject: str, max_bytes: int) -> None:
        self._bus = bus
        self._subject = subject
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[str, bytes, Callable[[], None] | None]] = deque()
        self._arrived = anyio.Event()
        self._stored = anyio.Event()
        self.bytes = 0
        self.published = 0
        self.retries = 0
        self.unacked = 0
        self.last_error = ""

    @property
    def full(self) -> bool:
        """Whether draining must pause."""
        return self.bytes >= self._max_bytes

    async def wait_empty(self) -> None:
        """Return once everything that was put is stored on the bus."""
        while self._waiting or self.unacked:
            self._stored = anyio.Event()
            await self._stored.wait()

    def put(self, msg_id: str, data: bytes, done: Callable[[], None] | None = None) -> None:
        """Take a batch over.  `done` is called once it is stored."""
        self._waiting.append((msg_id, data, done))
        self.bytes += len(data)
        self._arrived.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        async with anyio.create_task_group() as tasks:
            for _ in range(PARALLEL):
                tasks.start_soon(self._publish)

    async def _publish(self) -> None:
        while True:
            while not self._waiting:
                self._arrived = anyio.Event()
                await self._arrived.wait()
            msg_id, data, done = self._waiting.popleft()
            self.unacked += 1
            await self._insist(lambda i=msg_id, d=data: self._bus.publish(self._subject, d, msg_id=i))  # type: ignore[misc]
            self.unacked -= 1
            self.bytes -= len(data)
            self.published += 1
            if done:
                done()
            self._stored.set()

    async def _insist(self, publish: Callable[[], Awaitable[None]]) -> None:
        # The same message id each time, so a publish whose ack was lost is stored once.
        pause = _RETRY_SECONDS[0]
        while True:
            try:
                await publish()
            except TryAgain as e:
                if not self.last_error:
                    log.warning("%s; keeping batches in memory until it does", e)
                self.last_error = str(e)
                self.retries += 1
                await anyio.sleep(pause)
                pause = min(pause * 2, _RETRY_SECONDS[1])
            else:
                if self.last_error:
                    log.info("the bus takes batches again")
                    self.last_error = ""
                return
