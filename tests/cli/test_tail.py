"""`stella signals tail` against a running node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from node_kit import Node, eventually

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a node needs the collector's capabilities")


def test_tail_in_a_pipe_gives_the_evidence_lines_byte_for_byte(node: Node) -> None:
    """What tail prints is what the signer got; --count stops it; a table is for people."""
    node.start()
    done = node.stella("tail", "--count", "5")
    assert (0, "") == (done.returncode, done.stderr)
    lines = done.stdout.encode().splitlines()
    assert 5 == len(lines)
    eventually(lambda: set(lines) <= set(node.signed()))
    assert 5 == len(node.stella("tail", "--count=5", "--type=file_open", "--type=ssl_op").stdout.splitlines())
    table = node.stella("tail", "--count", "2", "--format", "table").stdout.splitlines()
    assert table[0].startswith("TIME") and 3 == len(table)


def tail(node: Node, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stella_cli", "signals", "tail", "--config", str(node.config), *words]
    return subprocess.Popen(command, env=node.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_tail_ends_quietly_with_ctrl_c_and_with_its_reader(node: Node) -> None:
    """No traceback, no message; a reader that leaves ends it even while no event comes."""
    node.start()
    with tail(node) as process:
        assert process.stdout is not None
        assert "event" in json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert b"" == process.communicate(timeout=10)[1]
        assert 0 == process.returncode
    with tail(node) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert 0 == process.wait(10)
        assert b"" == process.stderr.read()
    with tail(node, "--type", "ssl_op") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert 0 == process.wait(10)


def test_status_says_that_a_node_runs_whose_gateway_is_silent(node: Node) -> None:
    """The stand-in gateway speaks no HTTP: exit code 10, and the log to look at."""
    node.start()
    done = node.stella("status")
    assert 10 == done.returncode
    assert "the node runs (pid" in done.stderr and "gateway.log" in done.stderr
