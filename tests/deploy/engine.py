"""A Docker Engine with Compose v2 from Debian's packages, run by hand: own folders, socket and network namespace.

The engine of this Debian is too old for the compose file (it knows no CAP_BPF), so the next one's is unpacked,
not installed; it runs with this one's runc.  Nothing of it touches another engine, the machine's links or its
iptables.  What was downloaded stays in `.engine` beside this file until `make clean`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from stella_collector.targets import hierarchies

KEPT = Path(__file__).with_name(".engine")
PACKAGES = ("docker.io", "docker-cli", "containerd", "docker-buildx", "docker-compose")
PROGRAMS = ("apt-get", "dpkg", "ip", "iptables", "mmdebstrap", "nsenter", "runc", "unshare")
BASE = "python:3.11-slim-bookworm"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
V1_ROOT = Path("/sys/fs/cgroup")

Layout = Literal["host", "v2"]


def cgroup_root() -> Path:
    """Return where cgroup v2 is mounted."""
    return next(h.root for h in hierarchies() if not h.flag)


def lacking() -> str:
    """Return what this machine has not that an engine of our own needs, or ""."""
    if os.geteuid() != 0:
        return "it needs root"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(missing)} (make system-test installs them)"
    if not SOURCES.is_file() or not KEYRING.is_file():
        return f"no {SOURCES} or {KEYRING}: the engine's packages are Debian's"
    return ""


def layouts() -> list[Layout]:
    """Return the cgroup layouts that can be had here: the machine's, and v2 alone where that is another."""
    return ["host"] if cgroup_root() == V1_ROOT else ["host", "v2"]


def run(*command: str | Path, timeout: float = 120.0, **options: Any) -> str:
    """Run a command to its end and return what it printed; raises `AssertionError` with all of its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
    assert 0 == done.returncode, f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def fetch() -> None:
    """Make `.engine`: the engine unpacked, and a base image from Debian packages.  About half a minute, once."""
    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
        base = None
        if not (KEPT / "base.tar").exists():
            base = subprocess.Popen(
                [
                    *("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--dpkgopt=force-unsafe-io"),
                    "--include=python3,python3-venv,ca-certificates",
                    '--aptopt=Acquire::Languages "none"',
                    *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale")),
                    *("bookworm", f"{scratch}/base.tar"),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        try:
            if not (KEPT / "root").exists():
                _unpack(Path(scratch))
            if base is not None:
                said, _ = base.communicate(timeout=200)
                assert 0 == base.returncode, said[-4000:]
                Path(scratch, "base.tar").rename(KEPT / "base.tar")
        finally:
            if base is not None and base.poll() is None:
                base.kill()
                base.wait()


def _unpack(scratch: Path) -> None:
    """Download the engine's packages from the next Debian, signatures checked, and unpack them."""
    uri = next(line.split()[1] for line in SOURCES.read_text().splitlines() if line.startswith("URIs:"))
    for folder in ("lists/partial", "cache/archives/partial", "sources"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "sources" / "next.sources").write_text(
        f"Types: deb\nURIs: {uri}\nSuites: trixie\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": scratch / "sources",
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-qq", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    run(*apt, "update")
    run(*apt, "download", *PACKAGES, cwd=scratch)
    for package in scratch.glob("*.deb"):
        run("dpkg", "-x", package, scratch / "root")
    (scratch / "root").rename(KEPT / "root")


def promtool() -> Path:
    """Return Prometheus's own checker, unpacked from Debian's package: its daemon would take the gateway's port."""
    program = KEPT / "prometheus/usr/bin/promtool"
    if not program.exists():
        KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as scratch:
            run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", "prometheus", cwd=scratch)
            (package,) = Path(scratch).glob("*.deb")
            run("dpkg", "-x", package, Path(scratch, "root"))
            Path(scratch, "root").rename(KEPT / "prometheus")
    return program


class Engine:
    """One engine on one data root, started and stopped as often as needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.socket = folder / "docker.sock"
        self.namespace = f"stella-test-{os.getpid()}"
        plugins = folder / "client" / "cli-plugins"
        if not plugins.exists():
            plugins.mkdir(parents=True)
            for plugin in (KEPT / "root/usr/libexec/docker/cli-plugins").iterdir():
                (plugins / plugin.name).symlink_to(plugin)
        self.environment = {
            "PATH": f"{KEPT / 'root/usr/bin'}:{KEPT / 'root/usr/libexec/docker'}:{KEPT / 'root/usr/sbin'}:"
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(folder),
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(folder / "client"),
            "DOCKER_SOCKET": str(self.socket),
        }

    def docker(self, *words: str | Path, timeout: float = 120.0, **options: Any) -> str:
        """Run one docker command and return what it printed."""
        return run(KEPT / "root/usr/bin/docker", *words, timeout=timeout, env=self.environment, **options)

    def start_docker(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start one docker command; its output waits in pipes."""
        command = [KEPT / "root/usr/bin/docker", *words]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )

    def import_base(self) -> None:
        """Make the local stand-in for the official base image, which trusts what this machine trusts."""
        packed, extra = self.folder / "base.tar", self.folder / "extra"
        shutil.copyfile(KEPT / "base.tar", packed)
        run("tar", "--delete", "-f", packed, f".{CA_BUNDLE}")
        (extra / "usr/local/bin").mkdir(parents=True)
        (extra / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        with tarfile.open(packed, "a") as tar:
            tar.add(CA_BUNDLE.resolve(), f".{CA_BUNDLE}")
            tar.add(extra / "usr/local/bin/python", "./usr/local/bin/python")
        changes = (f"ENV PIP_CERT={CA_BUNDLE}", "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        self.docker("import", *(word for change in changes for word in ("-c", change)), packed, BASE)
        packed.unlink()

    @contextlib.contextmanager
    def running(self, *, bridges: bool, layout: Layout = "host") -> Iterator[None]:
        """Run the engine for the block: with bridges, in a namespace of its own, or without, where pip gets out."""
        network = ["--bip=172.31.77.1/24"]
        prefix: list[str] = []
        if bridges:
            run("ip", "netns", "add", self.namespace)
            # `ip netns exec` would hide cgroups, tracefs and bpffs behind a fresh /sys.
            prefix = ["nsenter", f"--net=/run/netns/{self.namespace}"]
            run(*prefix, "ip", "link", "set", "lo", "up")
        else:
            network = ["--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"]
        if layout == "v2":
            mount = f'mount --bind {cgroup_root()} {V1_ROOT} && exec "$0" "$@"'
            prefix += ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount]
        command = [
            *(*prefix, str(KEPT / "root/usr/sbin/dockerd"), *network, "--storage-driver", "overlay2"),
            *("--host", f"unix://{self.socket}", "--pidfile", str(self.folder / "docker.pid")),
            *("--data-root", str(self.data), "--exec-root", str(self.folder / "run")),
        ]
        try:
            with self._process(command):
                yield
        finally:
            if bridges:
                run("ip", "netns", "del", self.namespace)

    @contextlib.contextmanager
    def _process(self, command: Sequence[str]) -> Iterator[None]:
        log = self.folder / "dockerd.log"
        with log.open("ab") as out, subprocess.Popen(command, stdout=out, stderr=out, env=self.environment) as process:
            try:
                deadline = time.monotonic() + 30
                while True:
                    assert process.poll() is None, f"dockerd did not start:\n{log.read_text()[-3000:]}"
                    assert time.monotonic() < deadline, f"dockerd does not answer:\n{log.read_text()[-3000:]}"
                    with contextlib.suppress(AssertionError):
                        self.docker("version")
                        break
                    time.sleep(0.1)
                yield
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise

    def remove(self) -> None:
        """Remove every container that is left, with its volumes."""
        if left := self.docker("ps", "-aq").split():
            self.docker("rm", "-fv", *left)


@contextlib.contextmanager
def clean_cgroups(*ours: str) -> Iterator[None]:
    """Afterwards the cgroups that the engine made are gone, and the controllers that it switched on are off again."""
    roots = [root for root in [*V1_ROOT.iterdir(), V1_ROOT, cgroup_root()] if root.is_dir()]
    control = cgroup_root() / "cgroup.subtree_control"
    before = control.read_text().split()
    new = [root / name for root in roots for name in ("docker", *ours) if not (root / name).exists()]
    try:
        yield
    finally:
        for path in new:
            for below in sorted(path.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    below.rmdir()
            with contextlib.suppress(OSError):
                path.rmdir()
        for controller in set(control.read_text().split()) - set(before):
            with contextlib.suppress(OSError):
                control.write_text(f"-{controller}")
