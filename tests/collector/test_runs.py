"""The collector as a process on a real bus: batches follow on without a hole, and a run outlives its collector."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import anyio
import pytest
import yaml

from stella_collector.runs import pins_folder, unpin
from stella_shared import config, kernel_records, raw_batches, subjects
from stella_shared.bus import Bus
from stella_shared.wire import RawBatch, decode_raw, ledger_faults
from tests.shared.nats_kit import Server, serving
from tests.system.node import Cgroup, build_generator

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]
NODE = "runs"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


class Collector:
    """`python -m stella_collector` on one cgroup."""

    def __init__(self, folder: Path, url: str, cgroup: Cgroup) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        self.state = folder / "state"
        self.config = folder / "stellaops.yaml"
        self.process: subprocess.Popen[bytes] | None = None
        self.config.write_text(
            yaml.safe_dump(
                {
                    "signals": {
                        "node": NODE,
                        "output_directory": str(folder / "evidence"),
                        "ring_buffer_size": 64 << 20,
                        "bus": {"url": url},
                        "filters": {
                            "target_cgroups": [cgroup.name],
                            "paths": {"allowlist": [f"{self.work}/**"], "denylist": []},
                        },
                        "logging": {"format": "text"},
                    }
                }
            )
        )

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", "stella_collector", "--config", str(self.config)]

    def configure(self, **keys: object) -> None:
        """Change keys of the configuration that the next start reads."""
        content = yaml.safe_load(self.config.read_text())
        content["signals"].update(keys)
        self.config.write_text(yaml.safe_dump(content))

    def start(self, log: IO[bytes] | None = None) -> None:
        self.process = subprocess.Popen(self.command, stderr=log)

    def end(self, number: int) -> int:
        """Signal it and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def die_at(self, step: str, times: int) -> int:
        """Start one that kills itself at a step (`crash_driver`); return its exit code."""
        driver = [sys.executable, "-m", "tests.collector.crash_driver", step, str(times)]
        self.process = subprocess.Popen([*driver, "--config", str(self.config)])
        return self.process.wait(30)

    async def covers(self, text: str) -> None:
        """Wait until its coverage says so."""
        with anyio.fail_after(20):
            while not any(
                text in json.loads(memory.read_text())["coverage"]
                for memory in (self.state / "run").glob("collector-*.json")
            ):
                await anyio.sleep(0.002)

    async def heeds(self) -> None:
        """Wait until it heeds SIGTERM."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status")
        with anyio.fail_after(20):
            while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
                await anyio.sleep(0.02)

    def forget(self, **keys: object) -> None:
        """Have what is remembered of the runs say something else."""
        for memory in (self.state / "run").glob("collector-*.json"):
            memory.write_text(json.dumps({**json.loads(memory.read_text()), **keys}))

    def close(self) -> None:
        """End it at once, and remove what it left in the kernel."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pin in self.pins():
            unpin(pin)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    async def says_at_its_start(self) -> str:
        """Start it, wait until it has begun, end it in order, and return its log."""
        with (self.work.parent / "log").open("w+b") as log:
            self.start(log)
            await wait_for_run(self)
            assert 0 == await anyio.to_thread.run_sync(self.end, signal.SIGTERM)
            log.seek(0)
            return log.read().decode()

    @property
    def folder(self) -> Path:
        """The folder of its pins."""
        return pins_folder(config.load(self.config, {}))

    def pins(self) -> list[Path]:
        """Return the pinned runs of this test."""
        return list(self.folder.iterdir()) if self.folder.exists() else []


@pytest.fixture
def collector(tmp_path: Path, server: Server, cgroup: Cgroup) -> Iterator[Collector]:
    made = Collector(tmp_path, server.url, cgroup)
    yield made
    made.close()


async def batches(bus: Bus, final: int, seconds: float = 30.0) -> list[RawBatch]:
    """Take raw batches until `final` last ones have come."""
    found: list[RawBatch] = []
    async with bus.work(subjects.RAW_STREAM, "test", filter_subject=subjects.RAW_SUBJECTS, max_ack_pending=512) as work:
        with anyio.fail_after(seconds):
            while sum(batch.final for batch in found) < final:
                for message in await work.get(64, 0.0):
                    batch = decode_raw(message.data)
                    assert f"{batch.run}.{batch.number}" == message.msg_id
                    found.append(batch)
                    await message.ack()
    return sorted(found, key=lambda batch: (batch.ledger.end_ns, batch.number))


def books(run: list[RawBatch]) -> tuple[dict[int, int], int, Counter[str]]:
    """Check one run's batches; return its settled numbers by lane, its records, and its losses by cause."""
    assert list(range(len(run))) == [batch.number for batch in run], "no batch is missing"
    at: dict[int, int] = {}
    lost: Counter[str] = Counter()
    recorded = 0
    for batch in run:
        assert [] == ledger_faults(batch.ledger)
        for row in batch.ledger.lanes:
            assert row.first == at.get(row.lane, 0), "rows continue exactly"
            at[row.lane] = row.next
        counted = Counter(r.lane for r in raw_batches.records(batch.records))
        assert {row.lane: row.recorded for row in batch.ledger.lanes if row.recorded} == dict(counted)
        recorded += sum(counted.values())
        lost.update(batch.ledger.lost)
    return at, recorded, lost


async def test_kill_9_under_load_loses_nothing(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """Killed three times while 50,000 opens a second go on: one run, every open once, every number in order."""
    count, rate = 250_000, 50_000
    program = build_generator(tmp_path)
    generator = cgroup.run(
        program, collector.work, str(count), str(rate), "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert generator.stdin and generator.stdout
    generator.stdout.readline()
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        generator.stdin.write(b"x")
        generator.stdin.flush()
        for _ in range(3):
            await anyio.sleep(0.7)
            assert -signal.SIGKILL == collector.end(signal.SIGKILL)
            collector.start()
        await anyio.to_thread.run_sync(lambda: generator.communicate(timeout=30))
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    assert [] == collector.pins()
    assert [] == list((collector.state / "run").glob("*.json"))
    assert 1 == len({batch.run for batch in found})
    _, recorded, lost = books(found)
    assert {} == dict(lost)
    assert count == recorded == len(opens(found, collector.work))


def opens(found: list[RawBatch], work: Path) -> list[tuple[int, int]]:
    """Return (lane, number) of each open below `work`, none twice."""
    records = [r for batch in found for r in raw_batches.records(batch.records)]
    mine = [(r.lane, r.seq) for r in records if r.type == kernel_records.FILE_OPEN and os.fsencode(work) in r.body]
    assert len(set(mine)) == len(mine)
    return mine


async def wait_for_run(collector: Collector, but_not: str = "", seconds: float = 20.0) -> None:
    """Wait until a run has its first batch on the bus: it is on record then."""
    file = collector.state / "run" / "collector.json"
    with anyio.fail_after(seconds):
        while not file.exists() or (but_not and but_not in file.read_text()):
            assert collector.process is not None and collector.process.poll() is None
            await anyio.sleep(0.02)


async def test_a_clean_stop_settles_everything(collector: Collector, server: Server, cgroup: Cgroup) -> None:
    """SIGTERM: what was in flight is published, the last batch is final, nothing is left to close."""
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        assert 1 == len(collector.pins())
        code = f"for i in range(500):\n try: open('{collector.work}/%d' % i)\n except OSError: pass"
        assert 0 == await anyio.to_thread.run_sync(lambda: cgroup.run(sys.executable, "-c", code).wait(20))
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    _, _, lost = books(found)
    assert {} == dict(lost)
    opened = [r for batch in found for r in raw_batches.records(batch.records) if r.type == kernel_records.FILE_OPEN]
    mine = [r for r in opened if os.fsencode(collector.work) in r.body]
    assert 500 == len(mine)
    assert b"sys_enter_openat" in found[0].coverage
    assert [] == collector.pins()


async def test_a_run_whose_counters_are_gone_says_why(collector: Collector, server: Server) -> None:
    """After a reboot the counters ended with that kernel: the closing says so instead of a number."""
    file = collector.state / "run" / "collector.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"run":"aaaaaaaaaaaaaaaa","boot_id":"' + "0" * 32 + '"}')
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector, but_not="aaaaaaaaaaaaaaaa")
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    (closing,) = found[0].closings
    assert ("aaaaaaaaaaaaaaaa", "0" * 32, {}) == (closing.run, closing.boot_id, closing.taken)
    assert "restarted" in closing.reason
