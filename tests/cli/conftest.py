"""Fixtures of the command's tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported by path, so what they share is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))

import standin
from node_kit import ROOT, Node, free_port

from stella_cli import node_file


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node that can be started; whatever still runs at the end is killed by its pid."""
    config = tmp_path / "stellaops.yaml"
    config.write_text(
        f"signals:\n  output_directory: {tmp_path}/evidence\n  node: test.node\n  enrichers: 2\n"
        f"  bus: {{port: {free_port()}}}\n  metrics: {{port: {free_port()}}}\n"
    )
    (tmp_path / "manners").mkdir()
    services = standin.services_folder(tmp_path / "services")
    env = {k: v for k, v in os.environ.items() if not k.startswith("STELLA_")}
    env["PYTHONPATH"] = os.pathsep.join([str(services), str(ROOT / "shared"), str(ROOT / "cli")])
    env["STANDIN"] = str(tmp_path / "manners")
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    made = Node(tmp_path, config, env)
    yield made
    running = node_file.read(made.state)
    for process in made.started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if running and node_file.running(made.state):
        os.kill(running.who.pid, signal.SIGKILL)
