"""A node under test: its own folder, ports and cgroup.  Nothing outside that cgroup is recorded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml

from stella_collector.targets import hierarchies
from stella_shared.evidence.compressed import frames_of
from stella_shared.evidence.verify import verify_chain

HERE = Path(__file__).parent
STELLA = [sys.executable, "-m", "stella_cli"]


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def free_ports() -> tuple[int, int]:
    """Return two loopback ports that are free now."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return int(first.getsockname()[1]), int(second.getsockname()[1])


def build_generator(folder: Path) -> Path:
    """Compile generate.c and return the program."""
    program = folder / "generate"
    subprocess.run(["cc", "-O2", "-o", program, HERE / "generate.c"], check=True)
    return program


class Cgroup:
    """A cgroup v2 of the test's own.  Removed at the end, with every process it still holds killed by pid."""

    def __init__(self, name: str) -> None:
        self.name = f"/stella-test-{os.getpid()}-{name}"
        self.path = hierarchies()[0].root / self.name.lstrip("/")
        self.path.mkdir()

    def run(self, *command: str | Path, **kwargs: Any) -> subprocess.Popen[bytes]:
        """Start a command inside; it enters the cgroup before it becomes the command."""
        procs = str(self.path / "cgroup.procs")
        shell = ["/bin/sh", "-c", f'echo $$ > "{procs}" && exec "$0" "$@"', *map(str, command)]
        return subprocess.Popen(shell, **kwargs)

    def remove(self) -> None:
        """Kill what is left inside, then remove the directory."""
        for _ in range(50):
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)


class Node:
    """`stella signals start --detach` in a folder of its own."""

    def __init__(self, folder: Path, name: str, **signals: Any) -> None:
        self.folder = folder
        self.cgroup = Cgroup(name)
        self.config = folder / "stellaops.yaml"
        self.evidence = folder / "evidence"
        self.state = folder / "state"
        self.http, self.bus = free_ports()
        content: dict[str, Any] = {
            "node": name,
            "output_directory": str(self.evidence),
            "metrics": {"port": self.http},
            "bus": {"port": self.bus},
            "filters": {
                "target_cgroups": [self.cgroup.name],
                "paths": {"allowlist": [], "denylist": []},
                "networks": {"denylist": []},
            },
            "runtimes": dict.fromkeys(("docker_socket", "podman_socket", "containerd_socket", "cri_socket"), ""),
            "logging": {"format": "text"},
        }
        for key, value in signals.items():
            if isinstance(value, dict) and isinstance(content.get(key), dict):
                content[key] = {**content[key], **value}
            else:
                content[key] = value
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump({"signals": content}))

    def stella(self, *words: str, check: bool = True, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Run `stella signals …` on this node."""
        command = [*STELLA, "signals", words[0], "--config", str(self.config), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **kwargs)
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)} → {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
            )
        return done

    def start(self) -> Self:
        """Initialise and start; returns when every part beats."""
        self.stella("init")
        self.stella("start", "--detach")
        return self

    def stop(self) -> None:
        """Stop in order."""
        self.stella("stop")

    def get(self, path: str) -> dict[str, Any]:
        """Return a JSON answer of the gateway, whatever its status."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as e:
            return dict(json.load(e))

    def pids(self) -> dict[str, int]:
        """Return the pid of each part, by instance name."""
        text = json.loads((self.state / "run" / "node.json").read_text())
        return {"supervisor": int(text["who"]["pid"]), **{c["name"]: int(c["who"]["pid"]) for c in text["children"]}}

    def logs(self) -> str:
        """Return the ends of all logs, for a failure's message."""
        out = []
        for path in sorted((self.state / "logs").glob("*.log")):
            out.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]))
        return "\n".join(out)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield every evidence line of the closed chunks."""
        for path in sorted(self.evidence.glob("*.ndjson.zst")):
            for frame in frames_of(path):
                for line in frame.splitlines():
                    yield json.loads(line)

    def ledgers(self) -> list[dict[str, Any]]:
        """Return the ledgers of the closed chunks."""
        return [json.loads(path.read_text()) for path in sorted(self.evidence.glob("*.ledger.json"))]

    def verify(self) -> Any:
        """Return the report of the chain as a stranger with the key's fingerprint sees it."""
        keys = json.loads((self.state / "keys" / "trusted.json").read_text())
        trusted = {row["key_id"] for row in keys["keys"]}
        return verify_chain(self.evidence, trusted_keys=trusted, head=self.state / "head.json", progress=None)

    def close(self) -> None:
        """Stop if it runs, and remove everything that could outlive the test."""
        if self.stella("stop", check=False).returncode:
            # What a killed node leaves attached is no other test's affair.
            self.stella("detach", "--wait", "0", "--pins", check=False)
        self.cgroup.remove()
        shutil.rmtree(self.state / "nats", ignore_errors=True)


@contextlib.contextmanager
def running(folder: Path, name: str, **signals: Any) -> Iterator[Node]:
    """Give a running node; it is stopped at the end whatever happened."""
    node = Node(folder, name, **signals)
    try:
        yield node.start()
    finally:
        node.close()
