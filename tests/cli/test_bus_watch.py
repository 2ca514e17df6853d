"""The supervisor's look at its server: whether it syncs as it was asked to, and room on its disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import pytest
from tests.shared.nats_kit import Server, serving

from stella_cli import bus_watch, nats_server
from stella_cli.nats_server import Embedded
from stella_shared import subjects
from stella_shared.bus import Bus
from stella_shared.config import BusUser

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Disk(NamedTuple):
    total: int
    used: int
    free: int


def system_server(folder: Path, sync: str) -> Server:
    """Return a server, not started, with a system account `sys`."""
    server = Server(folder)
    text = server._config.read_text().replace("jetstream {", f"jetstream {{ sync_interval: {sync}, ")
    text += "accounts { SYS { users: [{user: sys, password: sys}] } }\nsystem_account: SYS\n"
    server._config.write_text(text + "authorization { users: [{user: op, password: op}] }\nno_auth_user: op\n")
    return server


@pytest.mark.parametrize(
    ("does", "asked", "said"),
    [
        ('"10s"', 10, []),
        ("always", 0, []),
        ('"2m"', 10, ["the bus syncs every 120 s, not every 10 s as it was asked to"]),
        ('"10s"', 0, ["the bus syncs every 10 s, not every 0 s as it was asked to"]),
    ],
)
async def test_a_server_that_syncs_otherwise_is_told_of(tmp_path: Path, does: str, asked: int, said: list[str]) -> None:
    """What the server itself says counts, not what its configuration was meant to be."""
    server = system_server(tmp_path, does)
    server.start()
    heard: list[str] = []
    supervisor: Any = SimpleNamespace(say=lambda level, text: heard.append(text))
    account = BusUser(user="sys", password="sys")
    try:
        async with Bus.connect(server.url, name="test", account=account) as system:
            watcher = bus_watch.Watcher(supervisor, system, Embedded(server.url, [], tmp_path, account, asked))
            await watcher.check_sync(system)
    finally:
        server.kill()
    assert said == heard


async def test_a_consumers_state_of_zeros_is_removed(tmp_path: Path) -> None:
    """A power cut leaves it so, and no server would make the consumer again; whole and empty ones stay."""
    with serving(tmp_path) as server:
        async with Bus.connect(server.url, name="test") as bus:
            await bus.ensure_streams()
            for subject, stream, durable in (
                ("stella.raw.n", subjects.RAW_STREAM, subjects.RAW_DURABLE),
                ("stella.enriched.n.x", subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE),
            ):
                async with bus.work(stream, durable, filter_subject=subject, max_ack_pending=64) as work:
                    await bus.publish(subject, b"x", msg_id=stream)
                    for message in await work.get(1, 0.0):
                        await message.ack()
            state = (
                tmp_path / "nats/jetstream/$G/streams" / subjects.RAW_STREAM / "obs" / subjects.RAW_DURABLE / "o.dat"
            )
            with anyio.fail_after(10):
                while not state.exists() or not state.stat().st_size:
                    await anyio.sleep(0.05)
            server.kill()
            state.write_bytes(bytes(state.stat().st_size))
            assert [subjects.RAW_DURABLE] == nats_server.mend(tmp_path / "nats")
            assert [] == nats_server.mend(tmp_path / "nats")
            server.start()
            with anyio.fail_after(10):
                while not bus.connected:
                    await anyio.sleep(0.05)
            async with bus.work(
                subjects.RAW_STREAM, subjects.RAW_DURABLE, filter_subject="stella.raw.n", max_ack_pending=64
            ) as work:
                await bus.publish("stella.raw.n", b"later", msg_id="later")
                with anyio.fail_after(10):
                    while b"later" not in [message.data for message in await work.get(8, 0.0)]:
                        continue


async def test_what_is_in_the_evidence_gives_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk gets short, messages that the signer has finished go, and none that it has not."""
    heard: list[str] = []
    supervisor: Any = SimpleNamespace(say=lambda level, text: heard.append(text))
    with serving(tmp_path) as server:
        async with Bus.connect(server.url, name="test") as bus:
            await bus.ensure_streams()
            for i in range(10):
                await bus.publish(subjects.enriched("n", "file_open"), b"{}\n", msg_id=f"{i}")
            async with bus.work(
                subjects.ENRICHED_STREAM,
                subjects.SIGNER_DURABLE,
                filter_subject=subjects.ENRICHED_SUBJECTS,
                max_ack_pending=64,
            ) as work:
                messages = await work.get(10, 0.3)
                for message in messages[:6]:
                    await message.ack()
                with anyio.fail_after(5):
                    while await work.pending() != (0, 4):
                        await anyio.sleep(0.02)
                watcher = bus_watch.Watcher(
                    supervisor, bus, Embedded(server.url, [], tmp_path, BusUser(user="u", password="p"), 10)
                )
                for free, left in ((50 << 30, 10), (500 << 20, 4)):
                    disk = Disk(100 << 30, 0, free)
                    monkeypatch.setattr(bus_watch.shutil, "disk_usage", lambda _, disk=disk: disk)
                    monkeypatch.setattr(bus, "server", _healthy)
                    await watcher.look(bus)
                    assert left == (await bus._js.stream_info(subjects.ENRICHED_STREAM)).state.messages
    assert ["the disk of the bus has 500 MiB left: removed 6 messages from it that are in the evidence"] == heard


async def _healthy(what: str) -> dict[str, Any]:
    return {"status": "ok"}
