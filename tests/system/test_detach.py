"""`stella signals detach`: probes leave the kernel, and it is said how.  Other nodes here stay as they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.node import Node, running

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
    assert {"stella_exec", "stella_opena_ex", "stella_sr_ue"} <= {p["name"] for p in mine}
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


def test_at_once_the_collector_is_killed_and_its_run_stays_for_the_next_start(node: Node) -> None:
    """`--wait 0` waits for nobody; what was recorded is kept unless --pins is given, and the next start reads it."""
    node.start()
    collector, supervisor = node.pids()["collector"], node.pids()["supervisor"]
    node.cgroup.run("/bin/true").wait(20)
    said = json.loads(node.stella("detach", "--wait", "0", "--format", "json").stdout)
    assert {f"gone: its collector was killed (pid {collector})"} == {p["done"] for p in said["programs"]}
    assert not Path(f"/proc/{supervisor}/exe").exists()
    pins = [p for p in said["pins"] if "detach-" in p["path"]]
    assert ["kept, without probes"] == [p["done"].split(":")[0] for p in pins]
    run = Path(pins[0]["path"])
    assert run.is_dir()
    assert [] == [pin for pin in run.iterdir() if not pin.name.startswith(("map-", "journal"))]
    node.stella("start", "--detach")
    deadline = time.monotonic() + 10.0
    while run.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not run.exists()
    assert "ok" == node.get("/health")["components"]["collector"]["state"]
    node.stop()
    assert node.verify().valid
    rows = [row for ledger in node.ledgers() for row in ledger["runs"] if row["run"] == run.name]
    assert rows[-1]["final"] and not rows[-1]["unclean"]
    assert [] == [ledger["lost"] for ledger in node.ledgers() if ledger["lost"]]
    assert "/bin/true" in {line["event"].get("filename") for line in node.lines() if line["run"] == run.name}


def test_the_probes_of_a_node_that_was_killed_are_found_and_taken_out(node: Node) -> None:
    """kill -9 of the supervisor ends every part and leaves the probes: `stop` says so, `detach` takes them out."""
    node.start()
    collector, supervisor = node.pids()["collector"], node.pids()["supervisor"]
    mine = {program["id"] for program in loaded(node)[collector]}
    os.kill(supervisor, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while Path(f"/proc/{collector}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "stella signals detach" in node.stella("stop", check=False).stderr
    report = json.loads(node.stella("detach", "--dry-run", "--format", "json").stdout)
    kept = {program["id"] for program in report["programs"] if program["links"]}
    assert kept and kept <= mine
    assert {"would be unpinned: nobody reads it"} == {program["done"] for program in report["programs"]}
    said = json.loads(node.stella("detach", "--pins", "--format", "json").stdout)
    assert {"gone with what held it"} == {program["done"] for program in said["programs"]}
    assert ["removed"] == [pin["done"] for pin in said["pins"]]
    assert 4 == node.stella("detach", check=False).returncode


def test_pins_of_a_node_that_is_gone_are_removed_when_asked(node: Node) -> None:
    """--pins takes this node's pins, with a node running or not."""
    node.start()
    said = json.loads(node.stella("detach", "--wait", "0", "--pins", "--format", "json").stdout)
    assert ["removed"] == [p["done"] for p in said["pins"]]
    assert not Path(said["pins"][0]["path"]).exists()


#: A machine of its own as far as processes, mounts and pins go; programs are the kernel's, and seen from everywhere.
ALONE = (
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount",
    "--propagation",
    "private",
    "--mount-proc",
    "sh",
    "-ec",
)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Node]:
    """A node that is not to be touched."""
    with running(tmp_path / "outside", "detach-outside") as made:
        yield made


def test_all_ends_the_nodes_that_it_sees_and_names_what_others_hold(tmp_path: Path, outside: Node) -> None:
    """`--all` in a pid namespace: the node in there ends in order; the one outside goes on, and is told."""
    inside = Node(tmp_path / "inside", "detach-inside")
    stella = f"{sys.executable} -m stella_cli signals"
    config = f"--config {inside.config}"
    script = f"""
        mount -t bpf bpf /sys/fs/bpf
        {stella} init {config} >/dev/null
        {stella} start {config} --detach >/dev/null
        cp {inside.state}/run/node.json {tmp_path}
        ls /sys/fs/bpf/stella
        status=0
        {stella} detach {config} --all --pins --wait 30 --format json >{tmp_path}/said || status=$?
        echo $status
        ls /sys/fs/bpf/stella
    """
    try:
        done = subprocess.run([*ALONE, script], capture_output=True, text=True, timeout=120, check=False)
        assert 0 == done.returncode, done.stderr + inside.logs()
        pinned, status, *left = done.stdout.split("\n")
        children = json.loads((tmp_path / "node.json").read_text())["children"]
        (collector,) = [child["who"]["pid"] for child in children if child["name"] == "collector"]
        assert pinned.startswith("detach-inside-")
        assert [""] == left
        programs = json.loads((tmp_path / "said").read_text())["programs"]
        seen = [p for p in programs if p["holders"]]
        assert {collector} == {pid for p in seen for pid in p["holders"]}
        assert {f"gone: its node was ended (pid {collector})"} == {p["done"] for p in seen}
        assert {"stella_exec", "stella_opena_ex", "stella_sr_ue"} <= {p["name"] for p in seen}
        theirs = {p["id"]: bool(p["links"]) for p in loaded(outside)[outside.pids()["collector"]]}
        told = {p["id"]: p["done"] for p in programs if p["id"] in theirs}
        assert set(theirs) == set(told)
        for number, linked in theirs.items():
            assert told[number] == (
                "LEFT: held by nobody who can be seen from here" if linked else "attached to nothing"
            )
        assert "1" == status
        assert "programs are still attached, held by nobody who can be seen from here" in done.stderr
        report = inside.verify()
        assert (True, {}) == (report.valid, report.lost_by_cause)
        assert "stop" == report.chunks[-1].close_reason
        assert "ok" == outside.get("/health")["components"]["collector"]["state"]
    finally:
        inside.cgroup.remove()
