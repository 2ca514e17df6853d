"""A podman of our own: storage, runtime and API socket below one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.enricher.cgroup_kit import cgroup_of, mounts
from tests.enricher.docker_kit import image_tar

NAME: Final = "localhost/stella-test:1"
_CONF: Final = """
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "fit"
[engine.runtimes]
fit = ["{runtime}"]
"""


def why_no_podman() -> str:
    """Return what this machine lacks for a podman of our own, or ""."""
    if os.geteuid() != 0:
        return "podman's system containers need root"
    if not any(m.fstype == "cgroup2" for m in mounts()):
        return "no cgroup2 is mounted"
    missing = [program for program in ("podman", "runc", "busybox") if shutil.which(program) is None]
    if missing:
        packages = "podman runc busybox-static"
        return f"not installed: {', '.join(missing)} (apt-get install -y --no-install-recommends {packages})"
    return ""


class Podman:
    """Podman with its API served on `socket`."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "podman.sock"
        runtime = folder / "fit"
        runtime.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).parent}/fitting_runtime.py "$@"\n')
        runtime.chmod(0o755)
        conf = folder / "containers.conf"
        conf.write_text(_CONF.format(runtime=runtime))
        self.env = {**os.environ, "CONTAINERS_CONF": str(conf)}
        folders = [f"--{name}={folder / name}" for name in ("root", "runroot", "tmpdir")]
        self.command = ["podman", *folders, "--storage-driver=vfs"]

    def podman(self, *arguments: str, given: bytes = b"") -> str:
        """Run one podman command and return what it printed."""
        done = subprocess.run(
            [*self.command, *arguments], env=self.env, input=given, capture_output=True, timeout=60, check=False
        )
        assert 0 == done.returncode, done.stderr.decode()
        return done.stdout.decode().strip()

    def cgroup(self, container_id: str) -> tuple[int, str]:
        """Return cgroup id and path of a container's first process, read off the kernel."""
        return cgroup_of(int(self.podman("inspect", "-f", "{{.State.Pid}}", container_id)))


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Podman]:
    """Serve podman's API, with our image; afterwards its containers are gone."""
    podman = Podman(folder)
    command = [*podman.command, "system", "service", "--time=0", f"unix://{podman.socket}"]
    log = folder / "service.log"
    with log.open("wb") as out, subprocess.Popen(command, env=podman.env, stdout=out, stderr=out) as service:
        try:
            deadline = time.monotonic() + 20
            while service.poll() is None and not podman.socket.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            if not podman.socket.exists():
                pytest.fail(f"podman did not start:\n{log.read_text()[-3000:]}")
            podman.podman("import", "-c", 'CMD ["/bin/busybox", "sleep", "300"]', "-", NAME, given=image_tar())
            yield podman
        finally:
            with contextlib.suppress(AssertionError):
                podman.podman("rm", "-fa", "-t", "0")
            service.send_signal(signal.SIGTERM)
            service.wait(30)
