"""A real Docker Engine runs real containers, and the resolver names them and their images."""

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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from stella_enricher.containers import ContainerResolver
from stella_enricher.docker_api import DockerApi
from stella_shared.config import Resources

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

NAME = "stella-test:1"


def why_no_engine() -> str:
    """Return what this machine lacks for an engine of our own, or ""."""
    if os.geteuid() != 0:
        return "a Docker Engine needs root"
    if not mounts("cgroup2"):
        return "no cgroup2 is mounted"
    missing = [program for program in ("dockerd", "docker", "busybox") if shutil.which(program) is None]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (apt-get install -y --no-install-recommends docker.io busybox-static)"
        )
    return ""


def mounts(*kinds: str) -> list[Path]:
    """Return where file systems of these types are mounted."""
    rows = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [Path(fields.split()[4]) for fields, kind in rows if kind.split()[0] in kinds]


class Engine:
    """A running engine: its socket, and `docker` against it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket

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

    def cgroup(self, container_id: str) -> tuple[int, str]:
        """Return cgroup id and path of a container's first process, read off the kernel."""
        pid = self.docker("inspect", "-f", "{{.State.Pid}}", container_id)
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        path = next(line for line in lines if line.startswith("0::")).removeprefix("0::")
        return Path(f"{mounts('cgroup2')[0]}{path}").stat().st_ino, path


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
    socket, log = folder / "docker.sock", folder / "dockerd.log"
    command = [
        *("dockerd", "--host", f"unix://{socket}", "--pidfile", str(folder / "docker.pid")),
        *("--data-root", str(folder / "data"), "--exec-root", str(folder / "run")),
        *("--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"),
        *("--storage-driver", "vfs"),
    ]
    ask = ["docker", "--host", f"unix://{socket}", "version"]
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        deadline = time.monotonic() + 20
        while process.poll() is None and subprocess.run(ask, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
            time.sleep(0.05)
        if process.poll() is not None:
            pytest.fail(f"dockerd did not start:\n{log.read_text()[-3000:]}")
        try:
            yield Engine(socket)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Give a running engine that has our image; afterwards nothing of it is left."""
    reason = why_no_engine()
    if reason:
        pytest.skip(f"containers of a real engine are not tested: {reason}")
    control = mounts("cgroup2")[0] / "cgroup.subtree_control"
    control_before = control.read_text()
    parents = [point / "docker" for point in mounts("cgroup", "cgroup2")]
    ours = [parent for parent in parents if not parent.exists()]
    with (
        tempfile.TemporaryDirectory(prefix="stella-engine-") as folder,
        started_engine(Path(folder)) as engine,
    ):
        try:
            change = 'CMD ["/bin/busybox", "sleep", "300"]'
            engine.docker("import", "--change", change, "-", NAME, given=image_tar())
            yield engine
        finally:
            left = engine.docker("ps", "-aq").split()
            if left:
                engine.docker("rm", "-f", *left)
    for parent in ours:
        if parent.exists():
            parent.rmdir()
    for controller in set(control.read_text().split()) - set(control_before.split()):
        control.write_text(f"-{controller}")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def resolving(engine: Engine) -> AsyncIterator[ContainerResolver]:
    """Give a resolver that runs against the engine."""
    async with DockerApi(str(engine.socket)) as docker:
        resolver = ContainerResolver(Resources(), docker)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resolver.run)
            yield resolver
            tasks.cancel_scope.cancel()


async def test_a_real_container_and_its_image_are_named(engine: Engine) -> None:
    """The id is the engine's own, and the digest is the one that the engine gives for the image."""
    async with resolving(engine) as resolver:
        await anyio.sleep(0.1)
        container_id, cgroup = engine.start_container()
        await resolver.settle(dict([cgroup]), timeout_seconds=2.0)
        found = resolver.lookup(*cgroup)
        assert (f"docker://{container_id}", "", "") == (found.container_id, found.reason, found.image_reason)
        digest = engine.docker("image", "inspect", "-f", "{{.Id}}", NAME)
        assert (digest, "config", NAME) == (found.image_digest, found.image_digest_kind, found.image_name)


async def test_a_restarted_container_has_a_new_cgroup_and_the_same_name(engine: Engine) -> None:
    """The cgroup id changes with a restart; both ids lead to the one container."""
    async with resolving(engine) as resolver:
        container_id, before = engine.start_container("--init" if shutil.which("docker-init") else "--tty")
        await resolver.settle(dict([before]), timeout_seconds=2.0)
        engine.docker("restart", "-t", "0", container_id)
        after = engine.cgroup(container_id)
        assert before != after
        await resolver.settle(dict([after]), timeout_seconds=2.0)
        assert f"docker://{container_id}" == resolver.lookup(*before).container_id
        assert resolver.lookup(*before) == resolver.lookup(*after)


async def test_a_removed_container_keeps_name_and_digest(engine: Engine) -> None:
    """What was known while a container lived is still said of its last events."""
    async with resolving(engine) as resolver:
        container_id, cgroup = engine.start_container()
        await resolver.settle(dict([cgroup]), timeout_seconds=2.0)
        known = resolver.lookup(*cgroup)
        engine.docker("rm", "-f", container_id)
        await anyio.sleep(1.2)
        assert known == resolver.lookup(*cgroup)
        assert known.image_digest


async def test_a_cgroup_parent_of_the_users_choice_is_understood(engine: Engine) -> None:
    """Under `--cgroup-parent` the runtime is assumed from the form of the name, and the engine confirms it."""
    parent = f"zz-stella-test-{os.getpid()}-engine"
    async with resolving(engine) as resolver:
        container_id, cgroup = engine.start_container("--cgroup-parent", f"/{parent}")
        await resolver.settle(dict([cgroup]), timeout_seconds=2.0)
        found = resolver.lookup(*cgroup)
        assert (f"docker://{container_id}", "assumed") == (found.container_id, found.id_basis)
        assert found.image_digest.startswith("sha256:")
        engine.docker("rm", "-f", container_id)
    for point in mounts("cgroup", "cgroup2"):
        with contextlib.suppress(FileNotFoundError):
            (point / parent).rmdir()
