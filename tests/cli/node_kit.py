"""A node made of the real supervisor, the real bus and small services, for tests to start and to hurt."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stella_cli import node_file

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `holds()` is true; fail when it is not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


@dataclass
class Node:
    """A node's folders, its configuration file, and the processes that were started for it."""

    folder: Path
    config: Path
    env: dict[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def manners(self) -> Path:
        return self.folder / "manners"

    def stella(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        command = [sys.executable, "-m", "stella_cli", "signals", *words, "--config", str(self.config)]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)

    def start(self, *, wait: bool = True, log: str = "start.log") -> subprocess.Popen[bytes]:
        """Start the node in the foreground; with `wait`, until all its parts beat."""
        path = self.folder / log
        command = [sys.executable, "-m", "stella_cli", "signals", "start", "--config", str(self.config)]
        with path.open("wb") as out:
            process = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.started.append(process)
        if wait:
            eventually(lambda: process.poll() is not None or "runs (pid" in path.read_text())
            assert process.poll() is None, path.read_text()
        return process

    def said(self, log: str = "start.log") -> str:
        return (self.folder / log).read_text()

    def pid(self, name: str) -> int:
        """Return the pid of a part as `node.json` has it; 0 while there is none."""
        node = node_file.read(self.state)
        return next((c.who.pid for c in node.children if c.name == name), 0) if node else 0

    def signed(self) -> list[bytes]:
        """Return the lines that reached the stand-in signer."""
        path = self.manners / "signed.ndjson"
        return path.read_bytes().splitlines() if path.exists() else []
