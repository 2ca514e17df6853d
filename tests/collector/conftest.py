"""Shared by the collector's tests: a loaded kernel side that watches one cgroup of the test's own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stella_collector import targets
from stella_collector.accounting import Accountant, decode_counters
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_shared import clock, config, events, kernel_records, raw_batches
from stella_shared.config import Signals
from stella_shared.wire import Ledger, ledger_faults
from tests.system.node import Cgroup

_names = itertools.count()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A cgroup v2 for the processes that may be watched."""
    made = Cgroup(f"collector-{next(_names)}")
    yield made
    made.remove()


def signals_of(**keys: Any) -> Signals:
    """Return a configuration without path and network filters; `keys` are dotted, with __ for the dot."""
    plain: dict[str, object] = {
        "filters.paths.allowlist": [],
        "filters.paths.denylist": [],
        "filters.networks.denylist": [],
    }
    return config.load(None, {}, {**plain, **{key.replace("__", "."): value for key, value in keys.items()}})


class Watched:
    """What became of the processes that ran: decoded records, and the ledger that covers all of them."""

    def __init__(self, kernel: Kernel, records: list[raw_batches.Record], ledger: Ledger) -> None:
        self.kernel = kernel
        self.records = records
        self.ledger = ledger

    def events(self, *types: type[Any]) -> list[Any]:
        """Return the events of these types, in the order of their numbers."""
        decoded = [kernel_records.decode_event(r.type, r.call, r.body, self.kernel.libraries) for r in self.records]
        return [event for event in decoded if not types or isinstance(event, types)]

    def paths(self) -> list[str]:
        """Return the paths of the opens."""
        return [event.path for event in self.events(events.FileOpen)]


class Watch:
    """The kernel side on one cgroup.  Run processes with `python`, then look at `finish()`."""

    def __init__(self, signals: Signals, cgroup: Cgroup) -> None:
        self.cgroup = cgroup
        self.kernel = Kernel(signals, Libbpf())
        assert targets.any_wanted(signals), "tests never watch the rest of the machine"
        self.kernel.set_targets(targets.resolve(signals))
        self.accountant = Accountant(self.kernel.lanes)
        self.accountant.begin(clock.boottime_ns())
        self.kernel.attach()
        self.records: list[raw_batches.Record] = []
        self.ledgers: list[Ledger] = []

    def python(self, code: str, *arguments: str | Path, check: bool = True) -> str:
        """Run Python code in the cgroup; return its output."""
        process = self.cgroup.run(
            sys.executable, "-S", "-E", "-c", code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = process.communicate(timeout=30)
        assert not check or process.returncode == 0, err.decode()
        return out.decode()

    def drain(self, *, last: bool = False) -> None:
        """Drain once and settle."""
        lost_before = decode_counters(self.kernel.counters())
        taken_before = decode_counters(self.kernel.counters())
        drained = self.kernel.ring.drain(1 << 18)
        ledger = self.accountant.settle(
            now_ns=clock.boottime_ns(),
            lost_before=lost_before,
            taken_before=taken_before,
            after=decode_counters(self.kernel.counters()),
            seen=self.kernel.ring.seen(),
            emptied=not drained.left,
            missed=self.kernel.missed(),
            last=last,
        )
        assert [] == ledger_faults(ledger)
        self.records += raw_batches.records(drained.records)
        self.ledgers.append(ledger)
        self.left = drained.left

    def finish(self) -> Watched:
        """Detach, drain, and return everything."""
        self.kernel.detach()
        while self.kernel.binaries.flush():
            self.drain()
        self.drain()
        while self.left:
            self.drain()
        self.drain(last=True)
        taken = {i: c.taken for i, c in enumerate(decode_counters(self.kernel.counters())) if c.taken}
        at: dict[int, int] = {}
        lost: dict[str, int] = {}
        filtered: dict[str, int] = {}
        for ledger in self.ledgers:
            for row in ledger.lanes:
                assert row.first == at.get(row.lane, 0), "rows continue exactly"
                at[row.lane] = row.next
            for total, part in ((lost, ledger.lost), (filtered, ledger.filtered)):
                for cause, n in part.items():
                    total[cause] = total.get(cause, 0) + n
        assert at == taken, "at the end every number is settled"
        assert len(self.records) == sum(row.recorded for ledger in self.ledgers for row in ledger.lanes)
        return Watched(self.kernel, self.records, Ledger(0, 0, [], filtered, lost))


@pytest.fixture
def watch(cgroup: Cgroup) -> Iterator[Callable[..., Watch]]:
    """Start watching the test's cgroup with these configuration keys; without targets it is the cgroup."""
    if os.geteuid() != 0:
        pytest.skip("loading BPF programs needs root")
    made: list[Watch] = []

    def start(**keys: Any) -> Watch:
        if not any(key.startswith("filters__target") for key in keys):
            keys["filters__target_cgroups"] = [cgroup.name]
        made.append(Watch(signals_of(**keys), cgroup))
        return made[-1]

    yield start
    for one in made:
        one.kernel.close()
