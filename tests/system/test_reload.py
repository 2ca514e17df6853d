"""A running node takes up a changed configuration: whole, without a lost event, and the evidence says from when on."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.node import Node, build_generator, running
from tests.system.test_kill import healthy, lost

pytestmark = pytest.mark.kernel


def change(node: Node, /, **keys: Any) -> None:
    """Change keys of the node's configuration file; a dict is merged into what is there."""
    document = yaml.safe_load(node.config.read_text())
    for key, value in keys.items():
        old = document["signals"].get(key)
        document["signals"][key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    node.config.write_text(yaml.safe_dump(document))


def reload(node: Node) -> dict[str, Any]:
    """Run `stella signals reload` and return its answer."""
    done = node.stella("reload", "--format", "json", check=False)
    answer = dict(json.loads(done.stdout))
    assert (0 if answer["ok"] else 2) == done.returncode, done.stderr
    return answer


def test_a_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    """Collector, enrichers and signer take it up one after the other; every open before and after is in the chain."""
    program = build_generator(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    with running(tmp_path / "node", "reload", enrichers=2, ring_buffer_size=1 << 20) as node:
        before = node.pids()
        count = 40_000
        generator = node.cgroup.run(
            program, work, str(count), "4000", "16", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert generator.stdin and generator.stdout
        generator.stdout.readline()
        generator.stdin.write(b"x")
        generator.stdin.flush()
        time.sleep(0.5)
        scope = {"target_cgroups": [node.cgroup.name], "networks": {"denylist": []}}
        change(
            node, filters={**scope, "paths": {"allowlist": [], "denylist": ["/never/**"]}},
            rotation={"max_age_hours": 2}, logging={"format": "text", "level": "debug"},
        )  # fmt: skip
        answer = reload(node)
        assert answer["ok"], answer
        assert ["filters.paths.denylist", "logging.level", "rotation.max_age_hours"] == answer["changed"]
        assert ["collector", "enricher", "signer", "gateway"] == answer["parts"]
        healthy(node)
        after = node.pids()
        assert {n for n in before if before[n] == after[n]} == {"supervisor", "nats", "collector"}
        generator.communicate(timeout=60)
        time.sleep(1.0)
        node.stop()
        assert node.verify().valid
        assert {} == lost(node)
        opens = [line for line in node.lines() if line["event"].get("path", "").startswith(f"{work}/libmodule-")]
        assert count == sum(1 for line in opens if line["event"]["flags"] & 0o100 == 0)
        documents = [held["document"] for ledger in node.ledgers() for held in ledger["coverage"]]
        assert ["/never/**"] in [document["filters"]["paths_deny"] for document in documents]
        assert 2 == len({document["config_sha256"] for document in documents})
        assert 1 == len({run["run"] for ledger in node.ledgers() for run in ledger["runs"]})


def test_a_change_that_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Nonsense, a key that holds for a node's life, and what the collector refuses: told, and all goes on."""
    with running(tmp_path / "node", "refuse") as node:
        before = node.pids()
        change(node, node="renamed", rotation={"max_age_hours": 2})
        answer = reload(node)
        assert not answer["ok"] and "signals.node cannot be changed while the node runs" in answer["error"]
        change(node, node="refuse", rotation={"max_age_hours": 2}, max_events_per_second=-1)
        done = node.stella("reload", check=False)
        assert (2, True) == (done.returncode, "max_events_per_second" in done.stderr)
        change(node, max_events_per_second=0, filters={"target_cgroups": []})
        answer = reload(node)
        assert not answer["ok"] and "between watching its targets and watching everything" in answer["error"]
        change(node, filters={"target_cgroups": [node.cgroup.name]}, rotation={"max_age_hours": 1})
        assert {"changed": [], "parts": []} == {k: v for k, v in reload(node).items() if k in ("changed", "parts")}
        healthy(node)
        assert before == node.pids()
        node.cgroup.run("cat", "/etc/hostname", stdout=subprocess.DEVNULL).wait()
        time.sleep(0.5)
        node.stop()
        assert node.verify().valid
        assert any(line["event"].get("path") == "/etc/hostname" for line in node.lines())
        done = node.stella("reload", check=False)
        assert (4, True) == (done.returncode, "no node runs" in done.stderr)
