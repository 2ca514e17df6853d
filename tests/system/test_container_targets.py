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

pytestmark = [pytest.mark.engine, pytest.mark.kernel]

SELECTOR = "label:test.team=we?"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Give a running engine that has our image; afterwards nothing of it is left."""
    reason = why_no_engine()
    if reason:
        pytest.skip(f"containers of a real engine are not tested: {reason}")
    with engine_with_image() as engine:
        yield engine


def lines_of(node: Node) -> list[dict[str, Any]]:
    """Return the recorded lines, oldest first."""
    files = sorted(node.evidence.glob("*.ndjson"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_label_selects_containers_from_their_first_program_on(engine: Engine, tmp_path: Path) -> None:
    """Each short-lived container with the label has its program start recorded, its image and labels named."""
    node = Node(
        tmp_path,
        "selected",
        filters={"target_cgroups": [], "target_containers": [SELECTOR]},
        runtimes={"docker_socket": str(engine.socket), "labels": ["test.*"]},
    )
    node.start()
    try:
        selected, others = [], []
        for number in range(4):
            name = f"stella-test-{number}"
            team = "web" if number % 2 else "db"
            started = engine.docker(
                *("run", "-d", "--network", "none", "--name", name, "--label", f"test.team={team}"),
                *("--label", "secret=x", NAME, "/bin/busybox", "sh", "-c", f"/bin/busybox cat /etc/{name}; sleep 0.05"),
            )
            (selected if number % 2 else others).append(started)
        caches = json.loads(node.stella("cache-stats", "--format", "json").stdout)["caches"]
        table = node.stella("status").stdout
        figures = node.stella("stats").stdout
        time.sleep(1.5)
    finally:
        node.stop()
    lines = lines_of(node)
    found = {line.get("container_id") for line in lines} - {None}
    assert {f"docker://{container_id}" for container_id in selected} == found
    digest = engine.docker("image", "inspect", "-f", "{{.Id}}", NAME)
    for container_id in selected:
        theirs = [line for line in lines if line.get("container_id") == f"docker://{container_id}"]
        starts = [line["event"]["argv"][:2] for line in theirs if line["event"]["type"] == "process_exec"]
        assert ["/bin/busybox", "sh"] in starts, starts
        for line in theirs:
            assert (digest, "config", NAME, {"test.team": "web"}) == (
                line["image_digest"],
                line["image_digest_kind"],
                line["image_name"],
                line["labels"],
            )
    assert verify_chain(node.evidence).valid
    ledgers = [json.loads(path.read_bytes()) for path in sorted(node.evidence.glob("*.ledger.json"))]
    covered = [t for ledger in ledgers for entry in ledger["coverage"] for t in entry["document"]["targets"]]
    assert {SELECTOR} == {target["asked"] for target in covered}
    assert set(selected) == {target["container"] for target in covered if "container" in target}
    assert {"containers", "images", "symbols", "symbol_tables", "arguments"} == {cache["cache"] for cache in caches}
    assert str(engine.socket) in table
    assert "ok" in table
    assert f"stellaops_signals_runtime_up{{api=docker,socket={engine.socket}}} 1" in figures
