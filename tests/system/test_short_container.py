"""A container that lives for 50 ms and does one thing of each kind leaves one record of each, with full names."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from stella_shared.events import json_schema
from tests.enricher.cgroup_kit import left_as_found, mounts
from tests.enricher.docker_kit import Engine, why_no_engine
from tests.system.node import Cgroup, Node
from tests.system.test_functions import is_watched

pytestmark = [pytest.mark.engine, pytest.mark.kernel, pytest.mark.slow]

IMAGE = "stella-short:1"
#: Opens one file, connects once, calls one function; then there is nothing left of the 50 ms.
PROGRAM = """
#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
__attribute__((noinline)) int deed(int n) { __asm__ volatile("" : "+r"(n)); return n + 1; }
int main(int argc, char **argv)
{
	struct sockaddr_in peer = { .sin_family = AF_INET, .sin_port = htons(9) };
	struct timespec rest = { .tv_nsec = argc > 1 ? 800000000 : 45000000 };
	peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	nanosleep(&rest, 0);
	close(open("/secret/plan", O_RDONLY));
	close(connect(socket(AF_INET, SOCK_STREAM, 0), (struct sockaddr *)&peer, sizeof(peer)));
	return deed(-1);
}
"""


def image_tar(folder: Path) -> bytes:
    """Return a root file system with the program and the file that it opens."""
    (folder / "short.c").write_text(PROGRAM)
    command = ["gcc", "-O1", "-static", "-Wl,--build-id", "-o", str(folder / "short"), str(folder / "short.c")]
    subprocess.run(command, check=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(folder / "short", "bin/short")
        info = tarfile.TarInfo("secret/plan")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    return packed.getvalue()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Give an engine whose containers share the image's files, as engines usually do, with our image."""
    if reason := why_no_engine():
        pytest.skip(f"a container of a real engine is not tested: {reason}")
    with left_as_found("docker"), tempfile.TemporaryDirectory(prefix="stella-short-") as folder:
        engine = Engine(Path(folder), storage="overlay2")
        engine.start()
        try:
            tar = image_tar(tmp_path_factory.mktemp("image"))
            engine.docker("import", "--change", 'ENTRYPOINT ["/bin/short"]', "-", IMAGE, given=tar)
            yield engine
        finally:
            with contextlib.suppress(AssertionError):
                engine.remove_all()
            engine.stop()


def run(engine: Engine, parent: Cgroup, *arguments: str) -> str:
    """Run a container below a cgroup that the node watches; return its id."""
    return engine.docker("run", "-d", "--network", "none", "--cgroup-parent", parent.name, IMAGE, *arguments)


def remove_below(name: str) -> None:
    """Remove the cgroups of this name that the engine has made in the v1 hierarchies."""
    for mount in mounts():
        if mount.fstype == "cgroup":
            with contextlib.suppress(OSError):
                Path(mount.point, name.lstrip("/")).rmdir()


def test_fifty_milliseconds_leave_four_records_with_full_names(engine: Engine, tmp_path: Path) -> None:
    """One program start, one open, one connect, one call: each with process, program, container and image."""
    node = Node(
        tmp_path,
        "short",
        filters={
            "paths": {"allowlist": ["/secret/**"], "denylist": []},
        },
        runtimes={"docker_socket": str(engine.socket)},
        probes={
            "inet_sock_set_state": False,
            "functions": [{"binary": "/bin/short", "functions": ["deed"]}],
        },
    )
    try:
        node.start()
        # Its file is not watched before somebody has run it: the first one lets itself be looked at.
        first = run(engine, node.cgroup, "slowly")
        deadline = time.monotonic() + 10
        while not is_watched(node, "/bin/short") and time.monotonic() < deadline:
            time.sleep(0.02)
        engine.docker("wait", first)
        shorts = [run(engine, node.cgroup) for _ in range(5)]
        for container in shorts:
            engine.docker("wait", container)
        time.sleep(1.5)
        node.stop()
    finally:
        engine.remove_all()
        remove_below(node.cgroup.name)
        node.close()
    assert node.verify().valid
    digest = engine.docker("image", "inspect", "-f", "{{.Id}}", IMAGE)
    validator = jsonschema.Draft202012Validator(json_schema())
    by_container: dict[str, list[dict[str, Any]]] = {}
    for line in node.lines():
        validator.validate(line)
        by_container.setdefault(line["container_id"], []).append(line)
    assert {f"docker://{container}" for container in [first, *shorts]} == set(by_container)
    for container in shorts:
        # The runtime prepares the container from inside its cgroup, and may start itself anew there: that is its
        # own doing, by its own program.
        everything = by_container[f"docker://{container}"]
        assert {"runc", "short"} >= {line["comm"].split(":")[0] for line in everything}, everything
        lines = [line for line in everything if line["comm"] == "short"]
        assert Counter(["file_open", "function_call", "net_connect", "process_exec"]) == Counter(
            line["event"]["type"] for line in lines
        ), lines
        assert [None] * 4 == [line.get("exe_reason") for line in lines]
        assert 1 == len({(line["pid"], line["start_ns"], line["exe"], line["exe_build_id"]) for line in lines})
        for line in lines:
            assert ("/bin/short", digest, "config", IMAGE) == (
                line["exe"], line["image_digest"], line["image_digest_kind"], line["image_name"],
            )  # fmt: skip
        events = {line["event"]["type"]: line["event"] for line in lines}
        assert ("/secret/plan", "/bin/short") == (events["file_open"]["path"], events["process_exec"]["filename"])
        assert ("127.0.0.1", 9) == (events["net_connect"]["address"], events["net_connect"]["port"])
        call = events["function_call"]
        assert ("/bin/short", "deed") == (call["binary"], call["symbol"])
        assert lines[0]["exe_build_id"] == call["build_id"] == call["stack"][0]["build_id"]
        assert "deed" == call["stack"][0]["symbol"]
        times = [line["ts_ns"] for line in lines]
        assert max(times) - min(times) < 100_000_000
