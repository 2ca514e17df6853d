"""A Docker Engine of our own, on folders and a socket of its own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stella_shared.config import Runtimes
from tests.enricher.cgroup_kit import cgroup_of, left_as_found, mounts

NAME = "stella-test:1"


def why_no_engine() -> str:
    """Return what this machine lacks for an engine of our own, or ""."""
    if os.geteuid() != 0:
        return "a Docker Engine needs root"
    if not any(m.fstype == "cgroup2" for m in mounts()):
        return "no cgroup2 is mounted"
    missing = [program for program in ("dockerd", "docker", "busybox") if shutil.which(program) is None]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (apt-get install -y --no-install-recommends docker.io busybox-static)"
        )
    return ""


class Engine:
    """A running engine: its socket, and `docker` against it."""

    def __init__(self, folder: Path, storage: str = "vfs") -> None:
        self.folder = folder
        self.storage = storage
        self.socket = folder / "docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the engine and wait until it answers."""
        log = self.folder / "dockerd.log"
        command = [
            *("dockerd", "--host", f"unix://{self.socket}", "--pidfile", str(self.folder / "docker.pid")),
            *("--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "run")),
            *("--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"),
            *("--storage-driver", self.storage, "--shutdown-timeout", "1"),
        ]
        ask = ["docker", "--host", f"unix://{self.socket}", "version"]
        with log.open("ab") as out:
            process = self._process = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + 20
        while process.poll() is None and subprocess.run(ask, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
            time.sleep(0.05)
        if process.poll() is not None:
            pytest.fail(f"dockerd did not start:\n{log.read_text()[-3000:]}")

    def stop(self) -> None:
        """Stop the engine."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(30)

    def docker(self, *arguments: str, given: bytes = b"") -> str:
        """Run one docker command and return what it printed."""
        done = subprocess.run(
            ["docker", "--host", f"unix://{self.socket}", *arguments],
            input=given,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (0, b"") == (done.returncode, done.stderr), done.stderr.decode()
        return done.stdout.decode().strip()

    def start_container(self, *options: str) -> tuple[str, tuple[int, str]]:
        """Start a container that sleeps; return its id and its cgroup."""
        container_id = self.docker("run", "-d", "--network", "none", *options, NAME)
        return container_id, self.cgroup(container_id)

    def remove_all(self) -> None:
        """Remove every container; an engine that stops would wait ten seconds for those that run."""
        left = self.docker("ps", "-aq").split()
        if left:
            self.docker("rm", "-f", *left)

    def cgroup(self, container_id: str) -> tuple[int, str]:
        """Return cgroup id and path of a container's first process, read off the kernel."""
        return cgroup_of(int(self.docker("inspect", "-f", "{{.State.Pid}}", container_id)))


def image_tar() -> bytes:
    """Return a root file system with a static busybox and nothing else."""
    busybox = Path(shutil.which("busybox") or "").resolve()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
    return packed.getvalue()


@contextlib.contextmanager
def started_engine(folder: Path) -> Iterator[Engine]:
    """Run dockerd on folders and a socket of its own; it touches no network and no other engine."""
    engine = Engine(folder)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@contextlib.contextmanager
def engine_with_image() -> Iterator[Engine]:
    """Run an engine that has our image; afterwards nothing of it is left."""
    with (
        left_as_found("docker"),
        tempfile.TemporaryDirectory(prefix="stella-engine-") as folder,
        started_engine(Path(folder)) as engine,
    ):
        try:
            change = 'CMD ["/bin/busybox", "sleep", "300"]'
            engine.docker("import", "--change", change, "-", NAME, given=image_tar())
            yield engine
        finally:
            engine.remove_all()


def only(engine: Engine) -> Runtimes:
    """Return the configuration that asks this engine and nobody else."""
    return Runtimes(
        docker_socket=str(engine.socket), podman_socket="", containerd_socket="", cri_socket="", labels=["test.*"]
    )
