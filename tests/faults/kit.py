"""A node of which nothing but the generator's opens takes a number, so that every one of them can be accounted for.

The short forms run with all tests; `make faults` runs the long ones.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from stella_shared.bus import Bus
from stella_shared.config import BusUser
from stella_shared.evidence.compressed import frames_of
from tests.system.node import Node, build_generator

LONG: Final = os.environ.get("STELLA_FAULTS") == "long"
#: Files that the generator opens in turn; making them is an open each.
FILES: Final = 16


def until(holds: Callable[[], Any], what: str, seconds: float = 30.0, *, node: Node | None = None) -> None:
    """Wait until `holds()`; a gateway that does not answer yet is waited for too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, KeyError, ValueError, StopIteration):
            if holds():
                return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}\n{node.logs() if node else ''}")


class Load:
    """The generator in the node's cgroup: `count` opens of files in `folder`, `rate` a second (0: unthrottled)."""

    def __init__(self, node: Node, folder: Path, count: int, rate: int) -> None:
        program = folder.parent / "generate"
        if not program.exists():
            build_generator(folder.parent)
        folder.mkdir()
        self.folder = folder
        self.count = count
        self.made = count + FILES
        self._process = node.cgroup.run(
            program, folder, str(count), str(rate), str(FILES), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin and self._process.stdout
        assert b"ready\n" == self._process.stdout.readline()
        self._process.stdin.write(b"x")
        self._process.stdin.flush()

    @property
    def running(self) -> bool:
        """Whether it still opens files."""
        return self._process.poll() is None

    def end(self, seconds: float = 60.0) -> resource.struct_rusage:
        """Wait until it has made all its opens; return what it used."""
        until(self._gone, "the generator's end", seconds)
        assert 0 == self._process.returncode
        return self.used

    def _gone(self) -> bool:
        pid, status, used = os.wait4(self._process.pid, os.WNOHANG)
        if pid:
            self._process.returncode, self.used = os.waitstatus_to_exitcode(status), used
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
        return bool(pid)

    def recorded(self, node: Node) -> int:
        """Return how many of its opens are lines of closed chunks, each number once."""
        want = f'"path":"{self.folder}/'.encode()
        chunks = node.evidence.glob("*.ndjson.zst")
        return sum(frame.count(want) for path in chunks for frame in frames_of(path))


def make(folder: Path, name: str, *, data: Path | None = None, **signals: Any) -> Node:
    """Return a node, not started, that counts the opens below `folder`/work* and nothing else.

    Evidence and state are in `data`, its configuration never is: a node that lost that would record the machine.
    """
    probes = dict.fromkeys(
        ("sched_process_exec", "inet_sock_set_state", "libc_connect", "libc_accept", "openssl_read", "openssl_write"),
        False,
    )
    signals.setdefault("probes", probes)
    signals.setdefault("ring_buffer_size", 4 << 20)
    filters = {"paths": {"allowlist": [f"{folder}/work*/**"], "denylist": []}}
    if data is None:
        return Node(folder / "node", name, filters=filters, **signals)
    node = Node(folder / "node", name, filters=filters, output_directory=str(data / "evidence"), **signals)
    node.evidence, node.state = data / "evidence", data / "state"
    return node


@contextlib.contextmanager
def serving(node: Node) -> Iterator[Node]:
    """Start the node, and end it whatever happens."""
    try:
        yield node.start()
    finally:
        for pid in _pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        node.close()


def _pids(node: Node) -> list[int]:
    with contextlib.suppress(OSError):
        return list(node.pids().values())
    return []


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP a process for the length of the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def service(node: Node, name: str) -> dict[str, Any]:
    """Return the first `name` of /status."""
    return dict(next(row for row in node.get("/status")["services"] if row["service"] == name))


def lines(node: Node) -> int:
    """Return how many lines the signer has made durable."""
    return int(node.get("/status")["totals"]["lines"] or 0)


def operator(node: Node) -> tuple[str, BusUser]:
    """Return the URL of the node's bus and who may change its streams."""
    import json

    seeds = json.loads((node.state / "bus.json").read_text())["users"]
    return f"nats://127.0.0.1:{node.bus}", BusUser(seed=seeds["operator"]["seed"])


def as_operator(node: Node) -> contextlib.AbstractAsyncContextManager[Bus]:
    """Connect to the node's bus as the operator."""
    url, account = operator(node)
    return Bus.connect(url, name="test", account=account)


class Run:
    """A running node and all that was done to it, so that it can be accounted for at the end."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.loads: list[Load] = []
        self._folder = folder

    def load(self, count: int, rate: int) -> Load:
        """Begin another load."""
        self.loads.append(Load(self.node, self._folder / f"work-{len(self.loads)}", count, rate))
        return self.loads[-1]

    def is_durable(self) -> bool:
        """Whether as many lines are durable as opens were made."""
        return lines(self.node) == sum(load.made for load in self.loads)

    def all_durable(self) -> None:
        """Wait until every open that was made is a durable line."""
        until(self.is_durable, "every line is durable", 120 if LONG else 30, node=self.node)

    def healthy(self) -> None:
        """Wait until every part is well."""
        until(lambda: self.node.get("/health")["status"] == "ok", "the node is healthy", node=self.node)

    def lost(self) -> dict[str, int]:
        """Return the losses that /status tells of, by cause."""
        told = self.node.get("/status")["totals"]["lost_by_cause"]
        return {cause: int(count) for cause, count in told.items() if count}

    def account(self) -> dict[str, int]:
        """Stop the node; check that the chain verifies and that each open is recorded once, or lost; return losses."""
        self.node.stop()
        report = self.node.verify()
        assert report.valid, report
        made = sum(load.made for load in self.loads)
        recorded = sum(load.recorded(self.node) for load in self.loads)
        totals, lost = report.totals, sum(report.lost_by_cause.values())
        assert (made, recorded) == (totals.recorded + lost, totals.recorded), (totals, report.lost_by_cause)
        return dict(report.lost_by_cause)
