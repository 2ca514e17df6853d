"""A whole node and a transparency log: chunks get there by themselves, also after the log was away."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stella_shared.evidence.verify import verify_chain
from tests.signer.log_kit import surroundings
from tests.system.node import Node, running

pytestmark = pytest.mark.kernel


def until(what: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `what()` is true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def signer(node: Node) -> dict[str, Any]:
    """Return what `stella signer status --format json` says."""
    from tests.system.node import STELLA

    command = [*STELLA, "signer", "status", "--config", str(node.config), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def work(node: Node) -> None:
    """Let something happen in the node's cgroup."""
    node.cgroup.run("/bin/sh", "-c", "cat /etc/hostname >/dev/null").wait()


@pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])
def test_a_node_logs_its_chunks_and_outlives_an_outage(tmp_path: Path, version: int) -> None:
    """Logged as they are signed; degraded and told while the log is away; logged without a hand when it is back."""
    with surroundings(version) as around:
        trust = around.write(tmp_path)
        with running(
            tmp_path / "node",
            f"log-v{version}",
            rotation={"max_age_hours": 0.0005},
            signing={"submit_to_rekor": True},
            rekor={"trust_config": str(trust), "read_url": around.log.read_url},
        ) as node:
            work(node)
            until(lambda: signer(node)["last_logged"] >= 2)
            assert signer(node)["mode"] == "local"
            around.log.down()
            until(lambda: "Failed to submit to Rekor: connection refused" in str(signer(node)["reason"]))
            health = node.get("/health")
            assert health["components"]["signer"]["state"] == "degraded"
            assert "Failed to submit to Rekor: connection refused" in node.logs()
            assert "runbook=issue-rekor-submission-failures" in node.logs()
            work(node)
            until(lambda: signer(node)["pending"] >= 2)
            around.log.up()
            reached = signer(node)["last_logged"]
            until(lambda: signer(node)["last_logged"] > reached and signer(node)["state"] == "ok")
            node.stop()
            # The last chunk is closed by the stop: whether it got out in time, or later by hand, makes no difference.
            node.stella("resubmit-pending")
            again = node.stella("resubmit-pending", "--format", "json")
            assert json.loads(again.stdout.splitlines()[-1]) == {"logged": 0, "left": 0, "rejected": 0, "error": ""}
        report = verify_chain(node.evidence)
        assert report.valid, report.faults
        assert {chunk.status for chunk in report.chunks} == {"VALID_LOGGED"}
        entries = around.log.v1.bodies if version == 1 else around.log.v2.bodies
        assert len(entries) == len(report.chunks)


def test_a_node_without_its_log_is_told_what_is_pending(tmp_path: Path) -> None:
    """`resubmit-pending` with the log away ends with 10 and the runbook's words, and nothing is lost by it."""
    with surroundings(2) as around:
        trust = around.write(tmp_path)
        with running(tmp_path / "node", "log-off", rekor={"trust_config": str(trust)}) as node:
            work(node)
            node.stop()
        around.log.down()
        failed = node.stella("resubmit-pending", check=False)
        assert failed.returncode == 10 and "Failed to submit to Rekor: connection refused" in failed.stderr
        around.log.up()
        assert "pending   0" in node.stella("resubmit-pending").stdout
        assert {chunk.status for chunk in verify_chain(node.evidence).chunks} == {"VALID_LOGGED"}
