"""Functions watched in containers of one image: another image's containers with the same program leave no line."""

from __future__ import annotations

import io
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collector.functions_kit import build_id_of, compiled, entry, wait_for
from tests.enricher.docker_kit import Engine, engine_with_image, image_tar, why_no_engine
from tests.system.node import Node

pytestmark = [pytest.mark.engine, pytest.mark.kernel, pytest.mark.slow]

WEB, DB = "stella-test-web:1", "stella-test-db:1"
SELECTED = "label:test.role=functions"
#: Waits for a file of the name that it is given, then calls `first` so many times and is done.
WAITER = """
#include <stdlib.h>
#include <unistd.h>
__attribute__((noinline)) int first(int n) { __asm__ volatile(""); return n + 1; }
int main(int argc, char **argv)
{
	while (access(argv[1], F_OK))
		usleep(10000);
	for (int i = 0; i < atoi(argv[2]); i++)
		first(i);
	return argc != 3;
}
"""


def with_program(program: Path) -> bytes:
    """Return a root file system of busybox and a program."""
    packed = io.BytesIO(image_tar())
    with tarfile.open(fileobj=packed, mode="a") as tar:
        tar.add(program, "bin/waiter")
    return packed.getvalue()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the program, which needs no library."""
    return compiled(tmp_path_factory.mktemp("waiter"), "waiter", WAITER, "-static", "-Wl,--build-id")


@pytest.fixture(scope="module")
def engine(program: Path) -> Iterator[Engine]:
    """Give an engine with two images that hold the same program."""
    reason = why_no_engine()
    if reason:
        pytest.skip(f"containers of a real engine are not tested: {reason}")
    with engine_with_image() as engine:
        for name in (WEB, DB):
            engine.docker("import", "-", name, given=with_program(program))
        yield engine


def start(engine: Engine, image: str, times: int) -> str:
    """Start a container whose program waits for /go; return its id."""
    options = ("-d", "--network", "none", "--label", "test.role=functions")
    return engine.docker("run", *options, image, "/bin/waiter", "/go", str(times))


def let_go(engine: Engine, container: str) -> None:
    """Let the program go on, and wait for its end."""
    engine.docker("exec", container, "/bin/busybox", "touch", "/go")
    assert "0" == engine.docker("wait", container)


def watched(node: Node) -> list[dict[str, Any]]:
    """Return what the collector says of files with watched functions."""
    collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
    return [row for row in collector["detail"]["binaries"] if row.get("image")]


def test_only_containers_of_the_image_have_their_calls_recorded(engine: Engine, program: Path, tmp_path: Path) -> None:
    """By path and by build-id, from both sides of a container's start; status and coverage say what is watched."""
    functions = [
        entry("/bin/waiter", "first", image="stella-test-web:*"),
        entry(f"build-id:{build_id_of(program)}", "first", image="stella-test-nobody", mode="count"),
    ]
    node = Node(
        tmp_path,
        "functionimages",
        filters={"target_cgroups": [], "target_containers": [SELECTED]},
        probes={"functions": functions, "sys_enter_openat": False},
        runtimes={"docker_socket": str(engine.socket), "labels": ["test.*"]},
    )
    try:
        before = start(engine, WEB, 3)
        node.start()
        wait_for(lambda: any(row["functions"] for row in watched(node)))
        other = start(engine, DB, 500)
        after = start(engine, WEB, 4)
        wait_for(lambda: 2 == sum(row["functions"] for row in watched(node)))
        time.sleep(0.5)  # time enough to attach to the other one's as well
        rows = watched(node)
        for container in (before, other, after):
            let_go(engine, container)
        status = node.stella("status").stdout
        time.sleep(1.5)
        node.stop()
    finally:
        node.close()

    nobody = "no container of that image is known"
    assert [("/bin/waiter", 1, "stella-test-web:*")] * 2 == [
        (row["binary"], row["functions"], row["image"]) for row in rows if row["functions"]
    ]
    assert [nobody] == [row["reason"] for row in rows if not row["functions"]]
    assert nobody in status
    found: Counter[tuple[str, str]] = Counter()
    starts: set[str] = set()
    for line in node.lines():
        if line["event"]["type"] == "function_call":
            found[line["container_id"], line["image_name"]] += 1
        starts.add(line["container_id"])
    assert {(f"docker://{before}", WEB): 3, (f"docker://{after}", WEB): 4} == found
    assert f"docker://{other}" in starts, "it is a target like the others"
    covered = [row["document"]["binaries"] for ledger in node.ledgers() for row in ledger["coverage"]]
    assert any(row["image"] == "stella-test-web:*" and row["functions"] for document in covered for row in document)
    assert node.verify().valid
