"""More events than this machine can record: the node stays up, the workload goes on, each loss has its number."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import anyio
import pytest

from stella_shared import subjects
from stella_shared.bus import Bus
from stella_shared.wire import decode_head
from tests.faults.kit import LONG, Run, lines, make, serving, until
from tests.system.node import Node

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

COUNT = 40_000_000 if LONG else 800_000
AFTER_RATE = 2_000
#: What each part may hold at the most, in MiB: its queues of bounded size, and what it needs anyway.
MEMORY_MIB = {"collector": 300, "enricher-1": 400, "signer": 600, "nats": 1500, "gateway": 150, "supervisor": 150}


class Watch:
    """What subscribers and operators see while it lasts: losses in the stream, /status, memory of each part."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.announced: dict[str, int] = {}
        self.most_mib: dict[str, int] = {}
        self._pids = node.pids()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._subscribe, self._measure)]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        assert self._pids == self.node.pids(), "a part died"

    def _measure(self) -> None:
        while not self._over.wait(0.2):
            for name, pid in self._pids.items():
                for row in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if row.startswith("VmHWM"):
                        self.most_mib[name] = int(row.split()[1]) >> 10

    def _subscribe(self) -> None:
        anyio.run(self._follow)

    async def _follow(self) -> None:
        url = f"nats://127.0.0.1:{self.node.bus}"
        async with Bus.connect(url, name="test") as bus, anyio.create_task_group() as tasks:

            async def over() -> None:
                await anyio.to_thread.run_sync(self._over.wait)
                tasks.cancel_scope.cancel()

            tasks.start_soon(over)
            async for message in bus.tail(subjects.ENRICHED_SUBJECTS):
                ledger = decode_head(message.head).ledger
                for cause, count in (ledger.lost if ledger else {}).items():
                    self.announced[cause] = self.announced.get(cause, 0) + count


def test_a_burst_beyond_what_can_be_recorded(tmp_path: Path) -> None:
    """Produced = recorded + lost to the last open; losses are in the stream, on /status and signed; then all is well.

    The generator is never put to sleep for us, no part dies, none grows beyond its bounds, and the first opens after
    the burst are all recorded.
    """
    node = make(tmp_path, "burst", ring_buffer_size=256 << 10)
    with serving(node):
        run = Run(node, tmp_path)
        with Watch(node) as seen:
            used = run.load(COUNT, 0).end(120)
            after = run.load(2 * AFTER_RATE, AFTER_RATE)
            after.end()
            made = sum(load.made for load in run.loads)
            until(lambda: lines(node) + sum(run.lost().values()) == made, "it is settled", 90, node=node)
            shown, health = run.lost(), node.get("/health")["status"]
        lost = run.account()
    assert {"ring_full"} == set(lost)
    assert lost == seen.announced == shown
    assert after.made == after.recorded(node)
    assert "ok" == health
    assert "Ring buffer full" in (node.state / "logs" / "node.log").read_text()
    # It slept while it waited to begin and at its end, and never in a call that was recorded.
    assert used.ru_nvcsw < 100
    assert {} == {name: mib for name, mib in seen.most_mib.items() if mib > MEMORY_MIB[name]}
