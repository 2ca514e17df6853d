"""A run outlives its collectors: killed at each step, upgraded, restarted, and with a bus that stalls."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from stella_shared import kernel_records, raw_batches, subjects
from stella_shared.bus import Bus
from stella_shared.evidence.compressed import frames_of
from stella_shared.evidence.verify import verify_chain
from tests.collector.crash_driver import GOING_ON, WORKING
from tests.collector.functions_kit import CALLER, compiled
from tests.collector.test_runs import Collector, batches, books, opens, wait_for_run
from tests.shared.nats_kit import Server, serving
from tests.system.node import Cgroup, build_generator

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as made:
        yield made


@pytest.fixture
def collector(tmp_path: Path, server: Server, cgroup: Cgroup) -> Iterator[Collector]:
    made = Collector(tmp_path, server.url, cgroup)
    yield made
    made.close()


class Load:
    """COUNT opens, RATE a second, below the collector's folder."""

    def __init__(self, collector: Collector, cgroup: Cgroup, folder: Path, count: int, rate: int) -> None:
        self.count = count
        self._process = cgroup.run(
            build_generator(folder), collector.work, str(count), str(rate), "4",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout
        self._process.stdout.readline()

    def go(self) -> None:
        """Begin."""
        assert self._process.stdin
        self._process.stdin.write(b"x")
        self._process.stdin.flush()

    async def end(self) -> None:
        """Return once all opens were made."""
        await anyio.to_thread.run_sync(lambda: self._process.communicate(timeout=60))


class Chain:
    """An enricher and a signer behind the collector, and what they have signed."""

    def __init__(self, collector: Collector) -> None:
        self._config = collector.config
        self._evidence = collector.config.parent / "evidence"
        self._state = collector.state
        stella = [sys.executable, "-m", "stella_cli", "signals", "init", "--config", str(self._config)]
        subprocess.run(stella, check=True, capture_output=True)
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", f"stella_{part}", "--config", str(self._config), "--instance", part]
            )
            for part in ("enricher", "signer")
        ]

    async def close(self, bus: Bus) -> None:
        """End both once they have worked off everything; the last chunk is signed then."""
        with anyio.fail_after(60):
            while await self._left(bus):
                await anyio.sleep(0.1)
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
            assert 0 == await anyio.to_thread.run_sync(process.wait, 30)

    async def _left(self, bus: Bus) -> int:
        raw = await bus._js.stream_info(subjects.RAW_STREAM)
        signers = await bus._js.consumers_info(subjects.ENRICHED_STREAM)
        return raw.state.messages + sum((c.num_pending or 0) + (c.num_ack_pending or 0) for c in signers)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the verified chain, which has lost nothing."""
        keys = json.loads((self._state / "keys" / "trusted.json").read_text())["keys"]
        trusted = {row["key_id"] for row in keys}
        report = verify_chain(self._evidence, trusted_keys=trusted, head=self._state / "head.json", progress=None)
        assert report.valid, report
        ledgers = [json.loads(path.read_text()) for path in sorted(self._evidence.glob("*.ledger.json"))]
        assert [] == [ledger["lost"] for ledger in ledgers if ledger["lost"]]
        runs = [row for ledger in ledgers for row in ledger["runs"]]
        assert 1 == len({row["run"] for row in runs})
        assert runs[-1]["final"] and not any(row["unclean"] or row["missing"] for row in runs)
        return [
            json.loads(line)
            for path in sorted(self._evidence.glob("*.ndjson.zst"))
            for frame in frames_of(path)
            for line in frame.splitlines()
        ]

    def kill(self) -> None:
        """End both at once, if they still run."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


async def test_killed_at_each_step_it_loses_nothing_and_says_nothing_twice(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """Each life dies at another step, while it works or while it goes on: the signed chain has every open once."""
    load = Load(collector, cgroup, tmp_path, 60_000, 4_000)
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        chain = Chain(collector)
        try:
            collector.start()
            await wait_for_run(collector)
            load.go()
            await anyio.sleep(0.3)
            collector.end(signal.SIGKILL)
            # A life that goes on needs something in flight: the one before it leaves a batch that is written, not sent.
            steps = [(step, 12) for step in WORKING]
            for step in GOING_ON:
                steps += [("written", 5), (step, 1)]
            for step, times in steps:
                assert -signal.SIGKILL == await anyio.to_thread.run_sync(collector.die_at, step, times), step
            collector.start()
            await load.end()
            await collector.heeds()
            assert 0 == collector.end(signal.SIGTERM)
            await chain.close(bus)
        finally:
            chain.kill()
    assert [] == collector.pins()
    lines = chain.lines()
    assert len(lines) == len({(line["lane"], line["seq"]) for line in lines})
    paths = [str(line["event"].get("path", "")) for line in lines]
    assert load.count == sum(path.startswith(f"{collector.work}/") for path in paths) == len(lines)


async def test_a_collector_that_dies_before_all_is_attached_leaves_no_run_behind(
    collector: Collector, server: Server
) -> None:
    """What it had pinned is removed by the next one, which begins a run of its own."""
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        assert -signal.SIGKILL == await anyio.to_thread.run_sync(collector.die_at, "attached", 1)
        (first,) = collector.pins()
        assert [] != [pin for pin in first.iterdir() if pin.name.startswith("link-")]
        collector.forget(attached=False)
        collector.start()
        await wait_for_run(collector)
        assert not first.exists()
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    assert first.name not in {batch.run for batch in found}
    assert [] == collector.pins()


async def test_a_collector_that_would_load_something_else_reads_the_former_run_to_its_end(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """Another ring size stands for an upgrade: both runs are whole, and together they miss no open."""
    load = Load(collector, cgroup, tmp_path, 80_000, 20_000)
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        load.go()
        await anyio.sleep(0.5)
        collector.end(signal.SIGKILL)
        (former,) = collector.pins()
        collector.configure(ring_buffer_size=32 << 20)
        collector.start()
        await wait_for_run(collector, but_not=former.name)
        await load.end()
        with anyio.fail_after(10):
            while former.exists():
                await anyio.sleep(0.05)
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=2)
    assert [] == collector.pins()
    runs = [[b for b in found if (b.run == former.name) == is_former] for is_former in (True, False)]
    assert all({} == dict(books(sorted(run, key=lambda b: b.number))[2]) for run in runs)
    assert all(run[-1].final for run in runs)
    told = [batch for batch in found if batch.number == 0]
    assert [] == [closing for batch in told for closing in batch.closings], "nothing is left to be closed"
    seen = [opens(run, collector.work) for run in runs]
    # While both are attached an open is recorded by both.
    assert load.count <= len(seen[0]) + len(seen[1])
    assert seen[0] and seen[1]


async def test_a_run_that_cannot_be_read_is_closed_from_its_counters(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """Records of another layout: the successor tells how many numbers there were, no more, no less."""
    load = Load(collector, cgroup, tmp_path, 40_000, 20_000)
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        load.go()
        await anyio.sleep(0.5)
        collector.end(signal.SIGKILL)
        (former,) = collector.pins()
        collector.forget(layout="of another release")
        collector.start()
        await wait_for_run(collector, but_not=former.name)
        assert not former.exists(), "its books are closed"
        await load.end()
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    assert [] == collector.pins()
    first = [batch for batch in found if batch.run == former.name]
    second = [batch for batch in found if batch.run != former.name]
    settled, recorded, lost = books(first)
    assert {} == dict(lost)
    (closing,) = second[0].closings
    assert (former.name, "") == (closing.run, closing.reason)
    assert all(closing.taken[lane] >= n for lane, n in settled.items())
    missing = sum(closing.taken.values()) - sum(settled.values())
    assert 0 < missing < load.count, "what was taken after its last batch died with it"
    settled_second, recorded_second, lost_second = books(second)
    assert second[-1].final
    assert not any(batch.closings for batch in second[1:])
    numbers = sum(closing.taken.values()) + sum(settled_second.values())
    assert numbers == recorded + missing + recorded_second + lost_second.total()
    assert numbers <= load.count


async def test_what_only_a_killed_process_had_is_numbered_as_lost(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """With a bus that stalls, batches give way to new records; a kill then costs exactly their numbers: `restart`."""
    collector.configure(ring_buffer_size=1 << 20)
    load = Load(collector, cgroup, tmp_path, 30_000, 10_000)
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        load.go()
        await anyio.sleep(0.3)
        os.kill(server.pid, signal.SIGSTOP)
        await anyio.sleep(1.5)
        collector.end(signal.SIGKILL)
        os.kill(server.pid, signal.SIGCONT)
        collector.start()
        await load.end()
        await collector.heeds()
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    assert 1 == len({batch.run for batch in found})
    settled, recorded, lost = books(found)
    assert lost["restart"] > 0
    assert {"restart", "ring_full"} >= set(lost)
    assert sum(settled.values()) == recorded + lost.total()
    assert load.count == len(opens(found, collector.work)) + lost.total()


async def test_calls_of_watched_functions_are_exact_on_both_sides_of_a_restart(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """Counters live on in the kernel; probes in files end with their collector, and the coverage shows the gap."""
    program = compiled(tmp_path, "caller", CALLER, "-lpthread")
    watched = {"binary": str(program), "functions": ["first"], "mode": "count"}
    collector.configure(probes={"functions": [watched]})
    caller = cgroup.run(program, "1000", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert caller.stdin and caller.stdout

    def call() -> None:
        assert caller.stdin and caller.stdout
        caller.stdin.write(b"x\n")
        caller.stdin.flush()
        assert b"done\n" == caller.stdout.readline()

    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await collector.covers('"functions":1')
        call()
        assert 0 == collector.end(signal.SIGUSR1), "it ends in order, and leaves the run"
        call()  # nobody sees these
        collector.forget(coverage="")
        collector.start()
        await collector.covers('"functions":1')
        call()
        call()
        assert 0 == collector.end(signal.SIGTERM)
        found = await batches(bus, final=1)
    caller.communicate(timeout=10)
    assert 1 == len({batch.run for batch in found})
    assert {} == dict(books(found)[2])
    records = [r for b in found for r in raw_batches.records(b.records) if r.type == kernel_records.FUNCTION_CALL]
    libraries = found[-1].libraries
    calls = [kernel_records.decode_event(r.type, r.call, r.body, libraries) for r in records]
    assert 3000 == sum(c.count for c in calls), "of 4000: all but those between the two"
    assert {str(program)} == {c.binary for c in calls}
    said = ['"functions":1' in batch.coverage.decode() for batch in found if batch.coverage]
    changes = [said[0], *(after for before, after in itertools.pairwise(said) if before != after)]
    assert [True, False, True] == changes[-3:]


async def test_probes_of_another_node_that_nobody_reads_are_told_of(
    collector: Collector, server: Server, cgroup: Cgroup, tmp_path: Path
) -> None:
    """A node that was killed and never comes back is named by the next collector on the machine, one alive is not."""
    other = Collector(tmp_path / "other", server.url, cgroup)
    try:
        async with Bus.connect(server.url, name="test") as bus:
            await bus.ensure_streams()
            collector.start()
            await wait_for_run(collector)
            assert str(collector.folder) not in await other.says_at_its_start()
            collector.end(signal.SIGKILL)
            assert str(collector.folder) in await other.says_at_its_start()
    finally:
        other.close()


async def test_two_collectors_of_one_node_are_one_too_many(collector: Collector, server: Server) -> None:
    """The second one waits for the first to end, and says why it does not begin."""
    async with Bus.connect(server.url, name="test") as bus:
        await bus.ensure_streams()
        collector.start()
        await wait_for_run(collector)
        second = [sys.executable, "-m", "stella_collector", "--config", str(collector.config)]
        done = await anyio.run_process(second, check=False)
        assert 10 == done.returncode
        assert b"another collector works on" in done.stderr
        assert 0 == collector.end(signal.SIGTERM)
