"""Parts that hang or are slow: the work goes on elsewhere, waits in order, and is seen to wait.

One node, with two enrichers and its evidence on a disk of its own, goes through one fault after the other.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import anyio
import pytest

from stella_shared import subjects
from tests.faults.disks import Disk, mounted, slowed
from tests.faults.kit import LONG, Run, as_operator, make, service, serving, stopped, until
from tests.system.node import Node

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

RATE = 50_000 if LONG else 10_000
SECONDS = 30 if LONG else 3


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("disk")
    with mounted(folder / "image", folder / "at", (8 << 30) if LONG else (512 << 20)) as made:
        yield made


@pytest.fixture(scope="module")
def run(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("slow")
    node = make(folder, "slow", data=disk.at, enrichers=2)
    with serving(node):
        yield Run(node, folder)


def waiting(node: Node, stream: str) -> float:
    """Return the bytes that the gateway says wait in a stream."""
    return float(node.get("/status")["queues"]["bus_waiting_bytes"][stream])


def test_one_of_two_enrichers_hangs(run: Run) -> None:
    """All its work is done by the other one while it still hangs; it is shown as failed, and comes back."""
    node = run.node
    load = run.load(RATE * SECONDS, RATE)
    time.sleep(0.5)
    with stopped(node.pids()["enricher-1"]):
        load.end()
        run.all_durable()
        found = node.get("/health")["components"]["enricher"]["instances"]
        assert {"slow-1": "failed", "slow-2": "ok"} == {name: row["state"] for name, row in found.items()}
    run.healthy()


def test_the_signer_hangs_and_a_subscriber_never_reads(run: Run) -> None:
    """The backlog is seen, enrichers wait before the stream drops a line, and all of it is signed afterwards.

    The stream is made small for it.  A subscriber of all lines that never reads changes nothing for the node.
    """
    node = run.node
    with socket.create_connection(("127.0.0.1", node.bus)) as deaf:
        deaf.sendall(b'CONNECT {"verbose":false}\r\nSUB stella.enriched.> 1\r\n')
        anyio.run(_shrink, node, 6_000_000)
        load = run.load(16 * RATE * SECONDS, 16 * RATE)
        time.sleep(0.5)
        with stopped(node.pids()["signer"]):
            until(
                lambda: "waiting for the signer" in service(node, "enricher")["reason"],
                "the enricher holds back", node=node,
            )  # fmt: skip
            until(lambda: waiting(node, "enriched") > 1_000_000, "the signer's backlog is shown", node=node)
            until(lambda: waiting(node, "raw") > 0, "the enricher's backlog is shown", node=node)
            until(lambda: node.get("/health")["components"]["signer"]["state"] == "failed", "it is failed", node=node)
            assert anyio.run(_dropped, node) <= 0
        load.end()
        run.all_durable()


async def _shrink(node: Node, max_bytes: int) -> None:
    async with as_operator(node) as bus:
        config = (await bus._js.stream_info(subjects.ENRICHED_STREAM)).config
        await bus._js.update_stream(config.evolve(max_bytes=max_bytes))


async def _dropped(node: Node) -> int:
    async with as_operator(node) as bus:
        info = await bus._js.consumer_info(subjects.ENRICHED_STREAM, subjects.SIGNER_DURABLE)
        state = (await bus._js.stream_info(subjects.ENRICHED_STREAM)).state
        return int(state.first_seq) - 1 - int(info.ack_floor.stream_seq)


def test_the_signers_disk_is_slow(run: Run, disk: Disk) -> None:
    """Behind a disk of 100 KB a second the evidence comes late and whole; the lag says so meanwhile."""
    node = run.node
    load = run.load(RATE * SECONDS, RATE)
    with slowed(disk, node.pids()["signer"], 100_000):
        load.end()
        assert not run.is_durable()
        until(lambda: waiting(node, "enriched") > 0, "the signer's backlog is shown", node=node)
    run.all_durable()


def test_nothing_of_all_that_was_lost_or_doubled(run: Run) -> None:
    """Every open is recorded once, and the chain verifies."""
    assert {} == run.account()
