"""A containerd of our own with CRI: images out of nothing, containers by `ctr`, pods as a kubelet makes them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import anyio
import pytest

from stella_enricher.runtimes.protobuf import Message, field
from stella_enricher.runtimes.sockets import GrpcSocket
from tests.enricher.cgroup_kit import cgroup_of, mounts

IMAGE: Final = "localhost/stella-test:1"
PAUSE: Final = "localhost/stella-pause:1"
#: enum NamespaceMode NODE, as the only field of a NamespaceOption: the pod uses the node's network.
_NODE_NETWORK: Final = b"\x08\x02"

_CONFIG: Final = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"""


def why_no_containerd() -> str:
    """Return what this machine lacks for a containerd of our own, or ""."""
    if os.geteuid() != 0:
        return "containerd needs root"
    if not any(m.fstype == "cgroup2" for m in mounts()):
        return "no cgroup2 is mounted"
    missing = [program for program in ("containerd", "ctr", "runc", "busybox") if shutil.which(program) is None]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (apt-get install -y --no-install-recommends docker.io busybox-static)"
        )
    return ""


class Containerd:
    """A running containerd."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "containerd.sock"
        self.config_digest = self.manifest_digest = ""

    def ctr(self, *arguments: str) -> str:
        """Run one `ctr` command and return what it printed."""
        done = subprocess.run(
            ["ctr", "--address", str(self.socket), *arguments], capture_output=True, timeout=60, check=False
        )
        assert 0 == done.returncode, done.stderr.decode()
        return done.stdout.decode()

    def import_image(self) -> None:
        """Import an image of a static busybox, as `IMAGE` and `PAUSE`, for ctr and for Kubernetes."""
        data, self.config_digest, self.manifest_digest = image_tar([IMAGE, PAUSE])
        path = self.folder / "image.tar"
        path.write_bytes(data)
        for namespace in ("default", "k8s.io"):
            self.ctr("-n", namespace, "images", "import", "--snapshotter", "native", str(path))

    def run(self, *options: str, namespace: str = "default") -> str:
        """Run a container that sleeps; return its id."""
        container_id = secrets.token_hex(32)
        self.ctr("-n", namespace, "run", "-d", "--snapshotter", "native", *options, IMAGE, container_id)
        return container_id

    def kill(self, container_id: str, namespace: str = "default") -> None:
        """End a container and remove it."""
        self.ctr("-n", namespace, "tasks", "rm", "-f", container_id)
        self.ctr("-n", namespace, "containers", "rm", container_id)

    def cgroup(self, container_id: str, namespace: str = "default") -> tuple[int, str]:
        """Return cgroup id and path of a container's first process, read off the kernel."""
        rows = [line.split() for line in self.ctr("-n", namespace, "tasks", "ls").splitlines()]
        return cgroup_of(int(next(row[1] for row in rows if row[0] == container_id)))


class Kubelet:
    """What a kubelet does: pods with one container each, over CRI."""

    def __init__(self, containerd: Containerd, cgroup_parent: str) -> None:
        self._grpc = GrpcSocket(str(containerd.socket), timeout_seconds=20.0)
        self._parent = cgroup_parent
        self._logs = str(containerd.folder / "logs")
        self._pods: list[str] = []

    async def _call(self, method: str, message: bytes) -> Message:
        return Message(await self._grpc.call(f"/runtime.v1.RuntimeService/{method}", message))

    async def run_pod(self, namespace: str, pod: str, container: str, *, kubelets_labels: bool) -> tuple[str, str]:
        """Run a pod with a container; return the ids of the sandbox and of the container."""
        # Numbers of fields from cri-api, pkg/apis/runtime/v1/api.proto.
        network = field(1, _NODE_NETWORK)
        of_pod = {"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": pod} if kubelets_labels else {}
        config = b"".join(
            [
                *(field(6, field(1, key) + field(2, value)) for key, value in of_pod.items()),
                field(1, field(1, pod) + field(2, secrets.token_hex(8)) + field(3, namespace)),
                field(3, self._logs),
                field(8, field(1, self._parent) + field(2, network)),
            ]
        )
        sandbox = (await self._call("RunPodSandbox", field(1, config))).text(1)
        self._pods.append(sandbox)
        labels = {"test.team": "web", **of_pod}
        if kubelets_labels:
            labels["io.kubernetes.container.name"] = container
        wanted = b"".join(
            [
                field(1, field(1, container)),
                field(2, field(1, IMAGE)),
                *(field(9, field(1, key) + field(2, value)) for key, value in labels.items()),
                field(11, f"{container}.log"),
                field(15, field(2, field(3, _NODE_NETWORK))),
            ]
        )
        made = await self._call("CreateContainer", field(1, sandbox) + field(2, wanted) + field(3, config))
        await self._call("StartContainer", field(1, made.text(1)))
        return sandbox, made.text(1)

    async def close(self) -> None:
        """Remove every pod."""
        for sandbox in self._pods:
            await self._call("StopPodSandbox", field(1, sandbox))
            await self._call("RemovePodSandbox", field(1, sandbox))
        await self._grpc.close()


def image_tar(names: list[str]) -> tuple[bytes, str, str]:
    """Return an OCI layout with one image under some names, its config digest and its manifest digest."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"digest": f"sha256:{digest}", "size": len(data)}

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as layer:
        layer.add(Path(shutil.which("busybox") or "").resolve(), "bin/busybox")
    oci = "application/vnd.oci.image"
    layer_entry = put(packed.getvalue())
    config = put(
        json.dumps(
            {
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
                "os": "linux",
                "config": {"Cmd": ["/bin/busybox", "sleep", "300"]},
                "rootfs": {"type": "layers", "diff_ids": [layer_entry["digest"]]},
            }
        ).encode()
    )
    manifest = put(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": f"{oci}.manifest.v1+json",
                "config": {"mediaType": f"{oci}.config.v1+json", **config},
                "layers": [{"mediaType": f"{oci}.layer.v1.tar", **layer_entry}],
            }
        ).encode()
    )
    entries = [
        {"mediaType": f"{oci}.manifest.v1+json", **manifest, "annotations": {"io.containerd.image.name": name}}
        for name in names
    ]
    blobs["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    blobs["index.json"] = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in blobs.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue(), str(config["digest"]), str(manifest["digest"])


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Containerd]:
    """Run containerd on folders and a socket of its own; afterwards its containers are gone."""
    config, log = folder / "config.toml", folder / "containerd.log"
    config.write_text(_CONFIG.format(folder=folder, pause=PAUSE))
    containerd = Containerd(folder)
    with (
        log.open("wb") as out,
        subprocess.Popen(["containerd", "--config", str(config)], stdout=out, stderr=out) as process,
    ):
        try:
            deadline = time.monotonic() + 20
            while process.poll() is None and not containerd.socket.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.poll() is not None or not containerd.socket.exists():
                pytest.fail(f"containerd did not start:\n{log.read_text()[-3000:]}")
            containerd.import_image()
            yield containerd
            for namespace in ("default", "k8s.io"):
                for container_id in containerd.ctr("-n", namespace, "tasks", "ls", "-q").split():
                    with contextlib.suppress(AssertionError):
                        containerd.kill(container_id, namespace)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


async def until(condition: object, seconds: float = 10.0) -> None:
    """Wait until `condition()` is true."""
    assert callable(condition)
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.02)
