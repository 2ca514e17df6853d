"""`make bench-containers`: containers that live for a moment, on a real Docker Engine; who of them has id and image?

A node watches the cgroup below which the containers are made, or the containers by a label.  Each container runs one
program that opens one file, and ends.  Then the evidence is read: which containers have lines, with which id, and
with an image or the reason why not.

    CONTAINERS   how many (200)        AT_ONCE   how many are started at a time (2)
    WATCH        cgroup, or label: then the engine, an enricher and the bus race with the start of each (cgroup)
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

from stella_shared.evidence.compressed import frames_of
from tests.enricher.cgroup_kit import mounts
from tests.enricher.docker_kit import NAME, Engine, engine_with_image, why_no_engine
from tests.system.node import Node

CONTAINERS = int(os.environ.get("CONTAINERS", "200"))
AT_ONCE = int(os.environ.get("AT_ONCE", "2"))
BY_LABEL = os.environ.get("WATCH", "cgroup") == "label"


def run_container(engine: Engine, parent: str, number: int) -> str:
    """Run one container to its end, below a cgroup; return its id."""
    where = () if BY_LABEL else ("--cgroup-parent", parent)
    return engine.docker(
        *("run", "-d", "--network", "none", "--label", "bench=yes", *where, NAME),
        *("/bin/busybox", "cat", f"/etc/stella-bench-{number}"),
    )


def lives(engine: Engine, ids: list[str]) -> list[float]:
    """Return how long each container's process lived, in seconds, by the engine's own clock."""
    out: list[float] = []
    for begin in range(0, len(ids), 100):
        said = engine.docker("inspect", "-f", "{{.State.StartedAt}} {{.State.FinishedAt}}", *ids[begin : begin + 100])
        for line in said.splitlines():
            started, finished = (datetime.fromisoformat(text[:26].rstrip("Z")) for text in line.split())
            # The engine notes the start after it has started: the shortest ones end before.
            out.append(max(0.0, (finished - started).total_seconds()))
    return out


def recorded(node: Node) -> list[dict[str, Any]]:
    """Return the evidence lines."""
    files = sorted(node.evidence.glob("*.ndjson.zst"))
    return [json.loads(line) for file in files for frame in frames_of(file) for line in frame.splitlines()]


def measure(engine: Engine, folder: Path) -> int:
    """Run the containers under a node, and print what became of them."""
    by_label = {"target_cgroups": [], "target_containers": ["label:bench=yes"]} if BY_LABEL else {}
    node = Node(
        folder,
        "bench",
        filters={**by_label, "paths": {"allowlist": ["/etc/**"], "denylist": []}},
        runtimes={"docker_socket": str(engine.socket), "labels": ["bench"]},
    )
    node.start()
    begun = time.monotonic()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ids = list(pool.map(lambda number: run_container(engine, node.cgroup.name, number), range(CONTAINERS)))
        took = time.monotonic() - begun
        time.sleep(2.0)
        node.stop()
    finally:
        for mount in mounts():
            if mount.fstype == "cgroup":
                with contextlib.suppress(OSError):
                    Path(mount.point, node.cgroup.name.lstrip("/")).rmdir()
        node.close()
    lines = recorded(node)
    mine = {f"docker://{container_id}" for container_id in ids}
    named = {line["container_id"] for line in lines if line.get("container_id") in mine}
    opened = {
        line["container_id"] for line in lines if str(line["event"].get("path", "")).startswith("/etc/stella-bench-")
    }
    unknown_ids = Counter(line.get("container_reason", "?") for line in lines if "unknown:" in line["container_id"])
    imaged = {line["container_id"] for line in lines if line.get("container_id") in mine and "image_digest" in line}
    without = Counter(line["image_reason"] for line in lines if "image_reason" in line)
    never = named - imaged
    life = lives(engine, ids)
    print(f"containers: {len(ids)}, {AT_ONCE} at a time, in {took:.1f} s")
    print(f"lives: median {1000 * statistics.median(life):.0f} ms, longest {1000 * max(life):.0f} ms")
    print(f"lives under 100 ms: {sum(seconds < 0.1 for seconds in life)}")
    print(f"containers with lines under their id: {len(named)}; their own program's open recorded: {len(opened)}")
    print(f"containers with an image: {len(imaged)}; without one in any line: {len(never)}")
    print(f"lines: {len(lines)}; of an unknown container: {dict(unknown_ids) or 0}")
    print(f"lines without an image: {dict(without) or 0}")
    return 0 if len(opened) == len(imaged) == len(ids) and not unknown_ids and not without else 1


def main() -> int:
    """Measure, and say whether any container stayed unknown."""
    reason = why_no_engine()
    if reason:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 2
    with engine_with_image() as engine, tempfile.TemporaryDirectory(prefix="stella-bench-") as folder:
        return measure(engine, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
