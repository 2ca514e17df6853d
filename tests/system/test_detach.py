"""`stella signals detach`: probes leave the kernel, and it is said how.  Other nodes here stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.node import Node

pytestmark = pytest.mark.kernel


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path, "detach")
    yield made
    made.stella("stop", check=False)
    made.stella("detach", "--wait", "0", "--pins", check=False)
    made.cgroup.remove()


def loaded(node: Node) -> dict[int, list[dict[str, Any]]]:
    """Return what is loaded on this machine, by the pid that holds it."""
    report = json.loads(node.stella("detach", "--all", "--dry-run", "--format", "json").stdout)
    found: dict[int, list[dict[str, Any]]] = {}
    for program in report["programs"]:
        for pid in program["holders"]:
            found.setdefault(pid, []).append(program)
    return found


def test_a_node_is_ended_in_order_and_its_evidence_is_whole(node: Node) -> None:
    """Each program is listed with its collector; afterwards none is loaded, and the chain is closed and valid."""
    node.start()
    collector = node.pids()["collector"]
    mine = loaded(node)[collector]
    assert {"stella_exec", "stella_opena_en", "stella_sr_ue"} <= {p["name"] for p in mine}
    assert all(len(p["tag"]) == 16 and p["this_release"] for p in mine)
    others = set(loaded(node)) - {collector}
    said = json.loads(node.stella("detach", "--format", "json").stdout)
    assert {p["id"] for p in mine} == {p["id"] for p in said["programs"]}
    assert {f"gone: its node was ended (pid {collector})"} == {p["done"] for p in said["programs"]}
    assert collector not in loaded(node)
    still = loaded(node)
    assert {pid for pid in others if Path(f"/proc/{pid}/exe").exists()} <= set(still)
    assert 0 == node.stella("verify-chain", str(node.evidence)).returncode
    assert 4 == node.stella("detach", check=False).returncode


def test_at_once_the_collector_is_killed_and_its_counters_stay_for_the_next_start(node: Node) -> None:
    """`--wait 0` waits for nobody; the pin is kept unless --pins is given, and the next start closes the books."""
    node.start()
    collector, supervisor = node.pids()["collector"], node.pids()["supervisor"]
    said = json.loads(node.stella("detach", "--wait", "0", "--format", "json").stdout)
    assert {f"gone: its collector was killed (pid {collector})"} == {p["done"] for p in said["programs"]}
    assert not Path(f"/proc/{supervisor}/exe").exists()
    pins = [p for p in said["pins"] if "detach-" in p["path"]]
    assert ["kept"] == [p["done"].split(":")[0] for p in pins]
    assert Path(pins[0]["path"]).exists()
    node.stella("start", "--detach")
    assert not Path(pins[0]["path"]).exists()
    assert "ok" == node.get("/health")["components"]["collector"]["state"]


def test_pins_of_a_node_that_is_gone_are_removed_when_asked(node: Node) -> None:
    """--pins takes this node's pins, with a node running or not."""
    node.start()
    said = json.loads(node.stella("detach", "--wait", "0", "--pins", "--format", "json").stdout)
    assert ["removed"] == [p["done"] for p in said["pins"]]
    assert not Path(said["pins"][0]["path"]).exists()
