"""A node that watches containers by a label: what they do is recorded with image, labels and name, others' is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stella_shared.evidence.verify import verify_chain
from tests.enricher.docker_kit import NAME, Engine, engine_with_image, why_no_engine
from tests.system.node import Node
from tests.system.test_reload import change, reload

pytestmark = [pytest.mark.engine, pytest.mark.kernel, pytest.mark.slow]

WEB, DB = "label:test.team=we?", "label:test.team=db"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Give a running engine that has our image; afterwards nothing of it is left."""
    reason = why_no_engine()
    if reason:
        pytest.skip(f"containers of a real engine are not tested: {reason}")
    with engine_with_image() as engine:
        yield engine


def run(engine: Engine, team: str, path: str) -> str:
    """Run a container of a team that opens a file and ends; return its id."""
    script = f"/bin/busybox cat {path}; sleep 0.05"
    labels = ("--label", f"test.team={team}", "--label", "secret=x")
    return engine.docker("run", "-d", "--network", "none", *labels, NAME, "/bin/busybox", "sh", "-c", script)


def targets(node: Node) -> list[dict[str, Any]]:
    """Return what the collector watches now."""
    services = node.get("/status")["services"]
    return [target for service in services for target in service["detail"].get("targets", [])]


def await_targets(node: Node, containers: list[str]) -> None:
    """Wait until the collector watches these containers."""
    deadline = time.monotonic() + 20
    while {target.get("container") for target in targets(node)} != set(containers):
        assert time.monotonic() < deadline, targets(node)
        time.sleep(0.1)


def test_a_label_selects_containers_from_their_first_program_on(engine: Engine, tmp_path: Path) -> None:
    """Short-lived containers with the label have everything recorded and named, others nothing; a reload changes it."""
    node = Node(
        tmp_path,
        "selected",
        filters={"target_cgroups": [], "target_containers": [WEB]},
        runtimes={"docker_socket": str(engine.socket), "labels": ["test.*"]},
    )
    try:
        node.start()
        teams: dict[str, list[str]] = {"web": [], "db": []}
        for number in range(4):
            team = ("db", "web")[number % 2]
            teams[team].append(run(engine, team, "/etc/first"))
        caches = json.loads(node.stella("cache-stats", "--format", "json").stdout)["caches"]
        table, figures = node.stella("status").stdout, node.stella("stats").stdout
        change(node, filters={"target_containers": [DB]})
        assert reload(node)["ok"]
        await_targets(node, teams["db"])
        later = {team: run(engine, team, "/etc/later") for team in teams}
        time.sleep(1.5)
        node.stop()
    finally:
        node.close()

    lines = list(node.lines())
    assert verify_chain(node.evidence).valid
    opened = {
        (line["event"]["path"], line["container_id"])
        for line in lines
        if line["event"].get("path") in ("/etc/first", "/etc/later")
    }
    expected = {("/etc/first", f"docker://{container_id}") for container_id in teams["web"]}
    assert {*expected, ("/etc/later", f"docker://{later['db']}")} == opened
    assert {container_id for _, container_id in opened} == {line["container_id"] for line in lines}
    starts = {line["container_id"] for line in lines if line["event"].get("argv", [])[:2] == ["/bin/busybox", "sh"]}
    assert {container_id for _, container_id in opened} == starts
    digest = engine.docker("image", "inspect", "-f", "{{.Id}}", NAME)
    for line in lines:
        assert (digest, "config", NAME) == (line["image_digest"], line["image_digest_kind"], line["image_name"])
        assert {"test.team": "db" if line["container_id"].endswith(later["db"]) else "web"} == line["labels"]

    covered = [t for ledger in node.ledgers() for held in ledger["coverage"] for t in held["document"]["targets"]]
    assert {WEB, DB} == {target["asked"] for target in covered}
    for selector, ids in ((WEB, teams["web"]), (DB, [*teams["db"], later["db"]])):
        assert set(ids) == {t["container"] for t in covered if t["asked"] == selector and "container" in t}

    enrichers = {"containers", "images", "symbols", "symbol_tables", "arguments", "events", "places"}
    assert {*enrichers, "cgroups", "programs"} == {cache["cache"] for cache in caches}
    assert str(engine.socket) in table
    assert f"stellaops_signals_runtime_up{{api=docker,socket={engine.socket}}} 1" in figures
