"""Looks after the embedded server: how it syncs, whether it takes messages, and whether its disk has room.

A stream whose disk refused a write takes no message any more, also when there is room again, until the server is
started anew.  So it is, with growing pauses while that does not help.  What the signer has finished is removed from
the bus when room gets short: it is in the evidence.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread

from stella_cli.nats_server import Embedded, sync_descriptions
from stella_shared import subjects
from stella_shared.bus import Bus
from stella_shared.errors import NotPermitted, TryAgain

if TYPE_CHECKING:
    from stella_cli.supervisor import Supervisor

CHECK_SECONDS: Final = 2.0
#: Room is short below this, or below a tenth of a smaller disk.
SHORT_BYTES: Final = 1 << 30
#: A purge writes, too: on a disk without room the server has been seen to hang in one for good.
PURGE_NEEDS_BYTES: Final = 16 << 20
RENEW_SECONDS: Final = 30.0
PAUSE_SECONDS: Final = (4.0, 60.0)
_RUNBOOK: Final = "docs/runbook.md#issue-bus-does-not-take-messages"


async def watch(supervisor: Supervisor, operator: Bus, embedded: Embedded) -> None:
    """Look every two seconds, for as long as the node runs."""
    watcher = Watcher(supervisor, operator, embedded)
    while True:
        with contextlib.suppress(TryAgain, NotPermitted):
            async with Bus.connect(embedded.url, name="supervisor", account=embedded.system) as system:
                await watcher.check_sync(system)
                while True:
                    await watcher.look(system)
                    await anyio.sleep(CHECK_SECONDS)
        await anyio.sleep(CHECK_SECONDS)


class Watcher:
    """What is known of the server so far."""

    def __init__(self, supervisor: Supervisor, operator: Bus, embedded: Embedded) -> None:
        self._say = supervisor.say
        self._supervisor = supervisor
        self._operator = operator
        self._store = embedded.store
        self._sync_seconds = embedded.sync_seconds
        self._refused = ""
        self._pause = PAUSE_SECONDS[0]
        self._next_try = 0.0
        self._purge_due = 0.0
        self._synced: dict[Path, int] = {}

    async def check_sync(self, system: Bus) -> None:
        """Say so when the server syncs otherwise than it was asked to."""
        found = ((await system.server("VARZ")).get("jetstream") or {}).get("config") or {}
        told = 0 if found.get("sync_always") else int(found.get("sync_interval") or 0) / 1e9
        if told != self._sync_seconds:
            self._say("warning", f"the bus syncs every {told:g} s, not every {self._sync_seconds} s as it was asked to")

    async def look(self, system: Bus) -> None:
        """See whether it takes messages; start it anew when it does not, and make room when there is little."""
        try:
            error = str((await system.server("HEALTHZ")).get("error", ""))
        except TryAgain:
            return  # away, or starting: that is the supervisor's and the gateway's to see
        if "write error" in error:
            await self._start_anew(error)
        elif self._refused:
            self._say("info", "the bus takes messages again")
            self._refused, self._pause = "", PAUSE_SECONDS[0]
        await anyio.to_thread.run_sync(sync_descriptions, self._store, self._synced)
        disk = shutil.disk_usage(self._store)
        if disk.free < min(SHORT_BYTES, disk.total // 10) and time.monotonic() >= self._purge_due:
            self._purge_due = time.monotonic() + PAUSE_SECONDS[1]
            await self._make_room(disk.free)

    async def _start_anew(self, error: str) -> None:
        if not self._refused:
            self._say("error", f"the bus takes no messages: {error}; see {_RUNBOOK}")
        self._refused = error
        if time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + self._pause
        self._pause = min(PAUSE_SECONDS[1], 2 * self._pause)
        free = shutil.disk_usage(self._store).free
        self._say("warning", f"starting the bus anew; its disk has {free >> 20} MiB left")
        with contextlib.suppress(TryAgain):
            await self._supervisor.renew("nats", RENEW_SECONDS)
            await self._make_room(free)

    async def _make_room(self, free: int) -> None:
        if free < PURGE_NEEDS_BYTES:
            return
        with contextlib.suppress(TryAgain):
            if gone := await self._operator.purge_finished(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE):
                self._say(
                    "warning",
                    f"the disk of the bus has {free >> 20} MiB left: "
                    f"removed {gone} messages from it that are in the evidence",
                )
