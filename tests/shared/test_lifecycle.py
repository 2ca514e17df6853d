"""What a service tells the one that started it: systemd by datagrams, a container engine by a file."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from stella_shared import lifecycle
from stella_shared.wire import Beat


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Quiet:
    """A bus that is heard by nobody."""

    async def beat(self, beat: Beat) -> None:
        """Take a beat."""


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which a manager waits, as systemd makes it: a path, or a name in the abstract namespace."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@stella-test-{os.getpid()}-{tmp_path.name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name.startswith("@") else name)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield sock


def heard(sock: socket.socket) -> list[list[str]]:
    """Return every message that has come: its lines."""
    found = []
    while True:
        try:
            found.append(sock.recv(4096).decode().splitlines())
        except BlockingIOError:
            return found


def beat_of(state: str, reason: str = "") -> Beat:
    return Beat("signer", "n", "n", os.getpid(), "0", 0.0, 0.0, state, reason)


async def beating(states: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beat once for each of `states`."""
    monkeypatch.setattr(lifecycle, "BEAT_SECONDS", 0.02)
    stop = anyio.Event()
    left = list(states)

    def make() -> Beat:
        state = left.pop(0) if left else "stopping"
        if not left:
            stop.set()
        return beat_of(state, "the disk is full" if state == "failed" else "")

    await lifecycle.beating(Quiet(), make, stop)  # type: ignore[arg-type]


@pytest.mark.anyio
async def test_a_manager_hears_ready_once_and_a_sign_of_life_with_every_beat(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before it works; then READY=1 the first time, WATCHDOG=1 every time, and how it is."""
    await beating(["starting", "ok", "degraded"], monkeypatch)
    assert [
        ["WATCHDOG=1", "STATUS=starting"],
        ["READY=1", "WATCHDOG=1", "STATUS=ok"],
        ["WATCHDOG=1", "STATUS=degraded"],
    ] == heard(manager)


@pytest.mark.anyio
async def test_a_service_that_failed_is_not_killed_for_it(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told, in one line, and the watchdog is content: a new start would not mend it."""
    await beating(["failed"], monkeypatch)
    assert [["WATCHDOG=1", "STATUS=failed: the disk is full"]] == heard(manager)


@pytest.mark.anyio
async def test_a_manager_hears_the_stop_at_the_signal_and_once(manager: socket.socket) -> None:
    """STOPPING=1 comes before the draining, and a second signal adds nothing."""
    with lifecycle.stop_event() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        await anyio.sleep(0.05)
    assert [["STOPPING=1"]] == heard(manager)


def test_nobody_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No manager, one that is gone, one whose queue is full: a service goes on at once."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    lifecycle.show("ok")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    lifecycle.show("ok")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "deaf"))
        began = time.monotonic()
        for _ in range(2000):
            lifecycle.show("ok")
        assert time.monotonic() - began < 5


@pytest.mark.anyio
async def test_the_health_file_is_there_while_the_service_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A health check finds it renewed; it is gone as soon as the service says that it has failed."""
    file = tmp_path / "health"
    monkeypatch.setenv(lifecycle.HEALTH_FILE, str(file))
    lifecycle.show("starting")
    assert not file.exists()
    lifecycle.show("degraded")
    os.utime(file, (1, 1))
    lifecycle.show("ok")
    assert "ok\n" == file.read_text()
    assert file.stat().st_mtime > 1
    lifecycle.show("failed", "no probe is attached")
    assert not file.exists()
    monkeypatch.setenv(lifecycle.HEALTH_FILE, str(tmp_path / "nowhere" / "health"))
    lifecycle.show("ok")
