"""Commands that ask a running node: nothing runs, or what listens never answers.  They end, and say which."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain_kit import environment
from node_kit import free_port

ASKING = (
    ("signals", "status"),
    ("signals", "status", "--verbose"),
    ("signals", "health"),
    ("signals", "stats"),
    ("signals", "stats", "--memory"),
    ("signals", "top"),
    ("signals", "top", "--once"),
    ("signals", "stop"),
    ("signals", "detach"),
    ("signals", "tail", "--count", "1"),
    ("signer", "status"),
)


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port on which connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def ask(folder: Path, port: int, words: tuple[str, ...]) -> tuple[subprocess.CompletedProcess[str], float]:
    config = folder / "stellaops.yaml"
    config.write_text(
        f"signals: {{output_directory: {folder}/evidence, metrics: {{port: {port}}}, bus: {{port: {free_port()}}}}}\n"
    )
    command = [sys.executable, "-m", "stella_cli", *words, "--config", str(config)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    return done, time.monotonic() - began


@pytest.mark.parametrize("words", ASKING, ids=" ".join)
def test_where_nothing_runs_it_is_said_with_exit_code_4(words: tuple[str, ...], tmp_path: Path) -> None:
    """An error that names the place, and what to do."""
    done, _ = ask(tmp_path, free_port(), words)
    assert 4 == done.returncode, done.stderr
    assert done.stderr.startswith("Error: no ")
    assert "Hint: " in done.stderr
    assert "" == done.stdout


@pytest.mark.parametrize("words", [ASKING[0], ASKING[5]], ids=" ".join)
def test_who_never_answers_is_not_waited_for(words: tuple[str, ...], tmp_path: Path, deaf: int) -> None:
    """Three seconds, then the reason."""
    done, seconds = ask(tmp_path, deaf, words)
    assert 4 == done.returncode
    assert "timed out" in done.stderr
    assert seconds < 15
