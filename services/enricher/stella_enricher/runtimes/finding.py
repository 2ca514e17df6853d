"""Which sockets of runtimes there are: the configured ones, and the usual ones that exist.

`auto` looks at the usual paths, again and again, for a runtime may come later than we; "" is not asked; a path
is asked whether it exists or not, so that its absence is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from stella_enricher.runtimes.containerd import ContainerdApi
from stella_enricher.runtimes.cri import CriApi
from stella_enricher.runtimes.docker import DockerApi
from stella_enricher.runtimes.facts import Runtime
from stella_enricher.runtimes.sockets import identity
from stella_shared.config import Runtimes

AUTO: Final = "auto"
#: Where each runtime's packages put the socket.
USUAL: Final[dict[str, tuple[str, ...]]] = {
    "docker": ("/run/docker.sock", "/var/run/docker.sock"),
    "podman": ("/run/podman/podman.sock",),
    "containerd": (
        "/run/containerd/containerd.sock",
        "/run/k3s/containerd/containerd.sock",
        "/run/k0s/containerd.sock",
        "/var/snap/microk8s/common/run/containerd.sock",
    ),
    "cri": ("/run/crio/crio.sock", "/var/run/crio/crio.sock"),
}


class SocketFinder:
    """Finds sockets; each is found once, under the first of its names."""

    def __init__(self, configured: Runtimes, usual: dict[str, tuple[str, ...]] = USUAL) -> None:
        self._configured = {
            "docker": configured.docker_socket,
            "podman": configured.podman_socket,
            "containerd": configured.containerd_socket,
            "cri": configured.cri_socket,
        }
        self._usual = usual
        self._found: set[tuple[str, object]] = set()

    @property
    def wanted(self) -> bool:
        """Whether any runtime may be asked at all."""
        return any(self._configured.values())

    def look(self) -> list[Runtime]:
        """Return the runtimes that have come since the last look."""
        new: list[Runtime] = []
        for api, configured in self._configured.items():
            if not configured:
                continue
            paths = self._paths(api) if configured == AUTO else [configured]
            for path in paths:
                # By its path too: a runtime that restarts makes a new socket, which is the same to us.
                names = {(api, path), (api, identity(path) or path)}
                if not names & self._found:
                    new.append(self._make(api, path))
                self._found |= names
        return new

    def _paths(self, api: str) -> Iterable[str]:
        paths = [path for path in self._usual[api] if identity(path)]
        if api == "cri" and self._configured["containerd"]:
            # containerd speaks CRI on its own socket.
            own = self._configured["containerd"]
            paths += [path for path in self._usual["containerd"] if identity(path)] if own == AUTO else [own]
        return paths

    def _make(self, api: str, path: str) -> Runtime:
        if api == "cri":
            return self._cri(path)
        makers: dict[str, Callable[[str], Runtime]] = {
            "docker": DockerApi,
            "podman": lambda socket: DockerApi(socket, runtime="podman"),
            # What Kubernetes runs there CRI tells better, where it is asked: it knows which image was taken.
            "containerd": lambda socket: ContainerdApi(socket, kubernetes=not self._configured["cri"]),
        }
        return makers[api](path)

    def _cri(self, path: str) -> Runtime:
        here = identity(path) or path
        if ("containerd", here) in self._found:
            return CriApi(path, serves=("containerd",), watched=True)
        usual = {identity(known) for known in self._usual["cri"]} - {None}
        return CriApi(path, serves=("cri-o",)) if here in usual else CriApi(path)
