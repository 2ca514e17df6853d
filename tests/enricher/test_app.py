"""Enrichers as processes on a real bus: whoever dies, each batch comes out exactly once, and nothing vanishes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
import yaml

from stella_shared import events, kernel_records, raw_batches, subjects
from stella_shared.bus import Bus
from stella_shared.evidence.compressed import unpack
from stella_shared.wire import RAW_VERSION, LaneRow, Ledger, PartHead, RawBatch, decode_head, encode_raw, ledger_faults
from tests.enricher.record_maker import file_open, process_exec, record
from tests.shared.nats_kit import Server, serving

pytestmark = pytest.mark.anyio
RUN = "f" * 16


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


@pytest.fixture
async def bus(server: Server) -> AsyncIterator[Bus]:
    async with Bus.connect(server.url, name="test") as connected:
        await connected.ensure_streams()
        yield connected


class Pool:
    """Enricher processes of one node."""

    def __init__(self, folder: Path, url: str) -> None:
        self.config = folder / "stellaops.yaml"
        signals = {
            "node": "n",
            "output_directory": str(folder / "evidence"),
            "bus": {"url": url},
            "filters": {"paths": {"allowlist": [], "denylist": ["/secret/*"]}},
            "runtimes": dict.fromkeys(("docker_socket", "podman_socket", "containerd_socket", "cri_socket"), ""),
            "logging": {"format": "text"},
        }
        self.config.write_text(yaml.safe_dump({"signals": signals}))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        name = f"e{len(self.processes)}"
        self.processes.append(
            subprocess.Popen([sys.executable, "-m", "stella_enricher", "--config", self.config, "--instance", name])
        )
        return self.processes[-1]

    async def stop(self) -> list[int]:
        """SIGTERM to those that live; return their exit codes."""
        alive = [p for p in self.processes if p.poll() is None]
        for p in alive:
            p.send_signal(signal.SIGTERM)
        return [await anyio.to_thread.run_sync(lambda p=p: p.wait(30)) for p in alive]  # type: ignore[misc]


@pytest.fixture
def pool(tmp_path: Path, server: Server) -> Iterator[Pool]:
    made = Pool(tmp_path, server.url)
    yield made
    for p in made.processes:
        if p.poll() is None:
            p.kill()
        p.wait()


def raw(number: int, records: bytes, recorded: int, **more: object) -> bytes:
    """Return an encoded raw batch of one lane; `seq` runs from 100 * number."""
    fields: dict[str, object] = {
        "version": RAW_VERSION, "node": "n", "boot_id": "b" * 32, "run": RUN, "number": number,
        "ledger": Ledger(1, 2, [LaneRow(0, 100 * number, 100 * number + recorded, recorded, 0, 0)], {}, {}),
        "coverage": b"", "final": False, "closings": [], "libraries": [], "records": records,
    }  # fmt: skip
    return encode_raw(RawBatch(**{**fields, **more}))  # type: ignore[arg-type]


def usual(number: int) -> bytes:
    """Return a batch of two opens, one of them filtered, and an exec."""
    rows = [
        record(1, 1, file_open(b"/etc/%d" % number), seq=100 * number),
        record(1, 1, file_open(b"/secret/x"), seq=100 * number + 1),
        record(2, 3, process_exec(b"/bin/true", b"", b"true\0"), seq=100 * number + 2),
    ]
    return raw(number, raw_batches.pack_batch(rows), 3)


async def enriched(bus: Bus, parts: int, seconds: float = 40.0) -> list[tuple[PartHead, str, bytes]]:
    """Read the enriched stream from its beginning until `parts` parts have come."""
    found = []
    async with bus.work(
        subjects.ENRICHED_STREAM, "test", filter_subject=subjects.ENRICHED_SUBJECTS, max_ack_pending=4096
    ) as work:
        with anyio.move_on_after(seconds):
            while len(found) < parts:
                for message in await work.get(64, 0.0):
                    found.append((decode_head(message.head), message.subject, unpack(message.data)))
                    await message.ack()
        with anyio.move_on_after(0.5):  # and whatever is too much
            for message in await work.get(64, 0.4):
                found.append((decode_head(message.head), message.subject, unpack(message.data)))
    return found


async def test_each_batch_comes_out_once_whoever_is_killed(bus: Bus, pool: Pool) -> None:
    """Two enrichers share; one is killed with batches in its hands; every part is stored exactly once."""
    count = 300
    victim = pool.start()
    pool.start()
    for number in range(count):
        await bus.publish(subjects.raw("n"), usual(number), msg_id=f"{RUN}.{number}")
        if number == count // 2:
            victim.kill()
    found = await enriched(bus, 2 * count)
    assert sorted((n, part) for n in range(count) for part in (0, 1)) == sorted((h.number, h.part) for h, *_ in found)
    for head, subject, body in found:
        assert (2, 1, RUN) == (head.parts, head.lines, head.run)
        assert ["stella.enriched.n.file_open", "stella.enriched.n.process_exec"][head.part] == subject
        line = events.decode_line(body)
        assert line.seq == 100 * head.number + 2 * head.part
        if head.part == 0:
            assert head.ledger is not None
            assert [] == ledger_faults(head.ledger)
            assert [LaneRow(0, 100 * head.number, 100 * head.number + 3, 2, 1, 0)] == head.ledger.lanes
            assert {"user_path": 1} == head.ledger.filtered
        else:
            assert head.ledger is None
    assert [0] == await pool.stop()


async def test_what_cannot_be_used_is_lost_by_name(bus: Bus, pool: Pool) -> None:
    """No batch at all is put away; a batch that lies, or would burst the bus, is lost by the enricher."""
    pool.start()
    await bus.publish(subjects.raw("n"), b"no batch", msg_id="x")
    good = raw_batches.pack_batch([record(1, 1, file_open(b"/x"))])
    tls = record(5, 11, kernel_records.SSL_OP_BODY.pack(1, 1, 0, 0))
    flood = raw_batches.pack_batch([tls] * 3000)
    for number, data in enumerate(
        [
            raw(0, good, 2),
            raw(1, good[:-8], 1),
            raw(2, b"\xff" * 200, 3),
            raw(3, flood, 3000, libraries=["/" + "x" * 4000]),
            raw(4, b"", 0, ledger=Ledger(1, 2, [], {"kernel_path": 5}, {})),
            raw(5, good, 1, coverage=b"\xff{}", final=True),
        ]
    ):
        await bus.publish(subjects.raw("n"), data, msg_id=f"{RUN}.{number}")
    found = sorted(await enriched(bus, 6, 15), key=lambda row: row[0].number)
    assert list(range(6)) == [head.number for head, *_ in found]
    for head, subject, body in found[:4]:
        assert head.ledger is not None
        lost = {0: 2, 1: 1, 2: 3, 3: 3000}[head.number]
        assert ({"enricher": lost}, 0) == (head.ledger.lost, head.lines)
        assert [] == ledger_faults(head.ledger)
        assert ("stella.enriched.n.ledger", b"") == (subject, body)
    quiet, last = found[4][0], found[5][0]
    assert quiet.ledger is not None
    assert {"kernel_path": 5} == quiet.ledger.filtered
    assert last.final
    assert 1 == last.lines
    assert [0] == await pool.stop()


async def test_stopping_finishes_what_is_there(bus: Bus, pool: Pool) -> None:
    """SIGTERM with a full queue: everything is enriched before the process ends with 0."""
    for number in range(200):
        await bus.publish(subjects.raw("n"), usual(number), msg_id=f"{RUN}.{number}")
    pool.start()
    with anyio.fail_after(20):
        while not int((await bus._js.stream_info(subjects.ENRICHED_STREAM)).state.messages):
            await anyio.sleep(0.01)
    assert [0] == await pool.stop()
    assert 400 == int((await bus._js.stream_info(subjects.ENRICHED_STREAM)).state.messages)
    assert 0 == int((await bus._js.stream_info(subjects.RAW_STREAM)).state.messages)


async def test_the_bus_may_die_meanwhile(bus: Bus, server: Server, pool: Pool) -> None:
    """kill -9 of the server while batches are enriched: each part is there once when it has come back."""
    pool.start()
    for number in range(100):
        await bus.publish(subjects.raw("n"), usual(number), msg_id=f"{RUN}.{number}")
    server.kill()
    server.start()
    found = await enriched(bus, 200, 30)
    assert sorted((n, part) for n in range(100) for part in (0, 1)) == sorted({(h.number, h.part) for h, *_ in found})
    assert [0] == await pool.stop()
