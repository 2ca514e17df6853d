"""The bus stalls, dies, loses its consumers, fills its disk and loses its streams, under load: one node, in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import anyio
import pytest

from stella_shared import subjects
from tests.faults.kit import LONG, Run, as_operator, make, service, serving, stopped, until
from tests.system.node import Node

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

RATE = 50_000 if LONG else 10_000
SECONDS = 20 if LONG else 2
STORE_MIB = 4096 if LONG else 256
#: What the collector may keep in memory, and the batches that were in its hands as it filled.
SPOOL_BYTES = (64 << 20) + (8 << 20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("bus")
    node = make(folder, "bus")
    store = node.state / "nats"
    store.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={STORE_MIB}m", "none", store], check=True)
    try:
        with serving(node):
            yield Run(node, folder)
    finally:
        subprocess.run(["umount", store], check=True)


def test_the_bus_stalls(run: Run) -> None:
    """SIGSTOP while events come: batches wait in the collector's bounded memory, and none is lost."""
    load = run.load(RATE * SECONDS, RATE)
    with stopped(run.node.pids()["nats"]):
        time.sleep(SECONDS)
    load.end()
    run.healthy()
    run.all_durable()


def test_the_bus_is_killed(run: Run) -> None:
    """kill -9, and a new one on the same store: nothing that was acknowledged or on its way is lost."""
    load = run.load(RATE * SECONDS, RATE)
    time.sleep(0.5)
    os.kill(run.node.pids()["nats"], signal.SIGKILL)
    load.end()
    run.healthy()
    run.all_durable()


def test_its_consumers_are_deleted(run: Run) -> None:
    """The enrichers' and the signer's: each makes its own again, and no message is passed over."""
    load = run.load(RATE * SECONDS, RATE)
    time.sleep(0.5)
    anyio.run(_delete_consumers, run.node)
    load.end()
    run.all_durable()


async def _delete_consumers(node: Node) -> None:
    async with as_operator(node) as bus:
        await bus._js.delete_consumer(subjects.RAW_STREAM, subjects.RAW_DURABLE)
        await bus._js.delete_consumer(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)


def test_its_disk_is_full(run: Run) -> None:
    """The node says so, keeps what comes in a bounded memory, and goes on by itself with room again: nothing lost."""
    node = run.node
    ballast = node.state / "nats" / "ballast"
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space left"):
        while True:
            os.write(file.fileno(), bytes(1 << 20))
    load = run.load(RATE * SECONDS, RATE)
    log = node.state / "logs" / "node.log"
    until(lambda: "the bus takes no messages" in log.read_text(), "it is told", node=node)
    # (It may soon have made room by itself: what is in the evidence goes.)
    until(lambda: "keeping batches in memory" in log.read_text(), "the collector says so", node=node)
    assert service(node, "collector")["detail"]["spool_bytes"] <= SPOOL_BYTES
    load.end()
    ballast.unlink()
    run.healthy()
    run.all_durable()
    until(lambda: "the bus takes messages again" in log.read_text(), "it is told", node=node)


def test_its_streams_are_deleted_with_a_backlog(run: Run) -> None:
    """What was in them is lost on the bus, by number, and its batches are named; all before and after is recorded."""
    node = run.node
    before, losses = list(run.loads), run.lost()
    with stopped(node.pids()["enricher-1"]):
        # More batches than an enricher is given before it has finished some: those it still saves.
        gone = run.load(RATE, RATE)
        gone.end()
        until(lambda: service(node, "collector")["detail"]["spool_bytes"] == 0, "it is on the bus", node=node)
        anyio.run(_delete_streams, node)
    run.healthy()
    after = run.load(RATE, RATE)
    after.end()
    found = run.account()
    assert ({}, {"bus"}) == (losses, set(found))
    assert gone.made == gone.recorded(node) + found["bus"]
    assert [load.made for load in (*before, after)] == [load.recorded(node) for load in (*before, after)]
    assert [span for ledger in node.ledgers() for one in ledger["runs"] for span in one["missing"]]


async def _delete_streams(node: Node) -> None:
    async with as_operator(node) as bus:
        for stream in (subjects.RAW_STREAM, subjects.ENRICHED_STREAM):
            await bus._js.delete_stream(stream)
