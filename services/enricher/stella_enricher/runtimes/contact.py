"""A runtime that may be away: what is asked of it is counted, and after a failure it is left alone for a while.

    well ──failure──▶ resting 1 s, 2 s, … 30 s, or until there is another socket ──▶ asked again

Beside the questions it is watched: its stream of events, and now and then the list of its containers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

import anyio

from stella_enricher.runtimes.facts import CONTAINER_ID, SOCKET_REASONS, Change, Facts, Listed, Refusal, Runtime
from stella_enricher.runtimes.sockets import identity

CALLS_AT_ONCE: Final = 4
FIRST_BACKOFF_SECONDS: Final = 1.0
LAST_BACKOFF_SECONDS: Final = 30.0
#: How long an API that its socket does not have is taken to be absent.
_ABSENT_SECONDS: Final = 60.0
#: Between the begin of the stream and the list: the runtime has taken the subscription by then.
_SUBSCRIBED_SECONDS: Final = 0.2


class Contact:
    """One API of one socket, how it is, and what was asked of it.  Nothing here raises."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._runtime = runtime
        self._clock = clock
        self._wall = wall
        self._failures_in_a_row = 0
        self._not_before = 0.0
        self._failed_socket: tuple[int, int] | None = None
        self._last_reason = ""
        self._answered_at = 0.0
        self._streaming = False
        self._resumed = anyio.Event()
        self._limiter = anyio.CapacityLimiter(CALLS_AT_ONCE)
        self._absent_until = 0.0
        self.calls = 0
        self.changes = 0
        self.failures: dict[str, int] = {}
        #: Whether its list has been taken, or cannot be: what is not in it is not there.
        self.listed = False

    @property
    def who(self) -> str:
        """Its API and socket, which tell it from others."""
        return f"{self._runtime.api} {self._runtime.socket}"

    @property
    def usual(self) -> str:
        """The runtime that is likeliest behind it."""
        return min(self._runtime.serves)

    @property
    def well(self) -> bool:
        """False while it is left alone after a failure."""
        if self._clock() >= self._not_before:
            return True
        if identity(self._runtime.socket) == self._failed_socket:
            return False
        # It has been started anew: what was before does not count.
        self._not_before, self._failures_in_a_row = 0.0, 0
        return True

    @property
    def retry_seconds(self) -> float:
        """How long it is still left alone."""
        return max(0.0, self._not_before - self._clock())

    def serves(self, runtime: str) -> bool:
        """Say whether it may know containers of `runtime`."""
        return runtime in self._runtime.serves and self.answers

    @property
    def answers(self) -> bool:
        """False where the socket's owner does not have this API at all."""
        return self._clock() >= self._absent_until

    async def facts_of(self, container_id: str) -> Facts:
        """Return what it knows of the container, or the reason why it says nothing.

        `no_runtime_socket`, `runtime_denied` (the socket's permissions), `runtime_timeout`, `runtime_error` (an
        error of the runtime's), `runtime_nonsense` (too big, not in form, not what was asked for),
        `container_not_found` (it does not know it), `not_a_container_id`.  While it is left alone the reason is
        that of the last failure.
        """
        if not CONTAINER_ID.fullmatch(container_id):
            return Facts(reason="not_a_container_id")
        async with self._limiter:
            if not self.well:
                return Facts(reason=self._last_reason)
            self.calls += 1
            try:
                facts = await self._runtime.facts_of(container_id)
            except Refusal as refusal:
                return Facts(reason=self._refused(refusal.reason))
            self._answered()
            return facts

    async def containers(self) -> list[Listed] | None:
        """Return its containers, None when it does not say."""
        if not self.well or not self.answers:
            return None
        self.calls += 1
        try:
            listed = await self._runtime.containers()
        except Refusal as refusal:
            self._refused(refusal.reason)
            return None
        self._answered()
        return listed

    async def watch(self, on_change: Callable[[Change], None], on_list: Callable[[list[Listed], float], None]) -> None:
        """Tell of every change, and now and then of the whole list and when it was begun, until cancelled."""
        async with anyio.create_task_group() as tasks:
            if self._runtime.streams:
                tasks.start_soon(self._follow, on_change)
            await anyio.sleep(_SUBSCRIBED_SECONDS)
            while True:
                begun = self._clock()
                listed = await self.containers()
                if listed is not None:
                    on_list(listed, begun)
                # Where there is no runtime there are no containers of its.
                self.listed |= listed is not None or not self.answers or self._last_reason == "no_runtime_socket"
                if listed is None:
                    await self._rest(FIRST_BACKOFF_SECONDS)
                else:
                    with anyio.move_on_after(self._runtime.watch_seconds):
                        await self._resumed.wait()
                    await anyio.sleep(_SUBSCRIBED_SECONDS)

    def status(self) -> dict[str, object]:
        """Return how it is, for the heartbeat: `state` is `ok`, `waiting`, `not there` or `not asked yet`."""
        state = "ok" if self._answered_at else "not asked yet"
        if not self.answers:
            state = "not there"
        elif not self.well or self._failures_in_a_row:
            state = "waiting"
        return {
            "runtime": "/".join(sorted(self._runtime.serves)),
            "api": self._runtime.api,
            "socket": self._runtime.socket,
            "state": state,
            "reason": self._last_reason if state in ("waiting", "not there") else "",
            "calls": self.calls,
            "failures": dict(self.failures),
            "changes": self.changes,
            "streaming": self._streaming,
            "last_answer_at": self._answered_at,
        }

    async def close(self) -> None:
        """Give its connections back."""
        with contextlib.suppress(Exception):
            await self._runtime.close()

    async def _follow(self, on_change: Callable[[Change], None]) -> None:
        pause = FIRST_BACKOFF_SECONDS
        while True:
            begun = self._clock()
            self._streaming = True
            try:
                async with contextlib.aclosing(self._runtime.changes()) as changes:
                    async for change in changes:
                        self.changes += 1
                        on_change(change)
            except Refusal as refusal:
                self.failures[refusal.reason] = self.failures.get(refusal.reason, 0) + 1
            self._streaming = False
            if self._clock() - begun > LAST_BACKOFF_SECONDS:
                pause = FIRST_BACKOFF_SECONDS
            was = identity(self._runtime.socket)
            await self._rest(FIRST_BACKOFF_SECONDS)
            waited = FIRST_BACKOFF_SECONDS
            while waited < pause and identity(self._runtime.socket) == was:
                await anyio.sleep(FIRST_BACKOFF_SECONDS)
                waited += FIRST_BACKOFF_SECONDS
            pause = min(LAST_BACKOFF_SECONDS, pause * 2)
            # What came meanwhile is in the list.
            self._resumed.set()
            self._resumed = anyio.Event()

    async def _rest(self, seconds: float) -> None:
        """Wait for `seconds`, and until it may be asked again."""
        await anyio.sleep(seconds)
        while not self.well:  # noqa: ASYNC110  # nobody tells when there is another socket
            await anyio.sleep(min(FIRST_BACKOFF_SECONDS, self.retry_seconds))

    def _answered(self) -> None:
        self._failures_in_a_row = 0
        self._answered_at = self._wall()

    def _refused(self, reason: str) -> str:
        if reason == "unimplemented":
            # The socket's owner does not speak this API (Docker's containerd has no CRI): it knows nobody.
            self._absent_until = self._clock() + _ABSENT_SECONDS
            self._last_reason = "this API is switched off there"
            return "container_not_found"
        self.failures[reason] = self.failures.get(reason, 0) + 1
        if reason not in SOCKET_REASONS:
            self._answered()
        elif self.well:  # A call that ran beside this one failed too: that is one failure, not two.
            wait = min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**self._failures_in_a_row)
            self._failures_in_a_row = min(self._failures_in_a_row + 1, 16)
            self._last_reason = reason
            self._failed_socket = identity(self._runtime.socket)
            self._not_before = self._clock() + wait
        return reason
