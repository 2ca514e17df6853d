"""What a cgroup path says about a container: runtime and id, or why there is none.  Pure.

The names, as the runtimes write them (ID is 64 lower-case hex digits):

    Docker       /docker/ID                       …/docker-ID.scope
    containerd   /kubepods/…/podUID/ID            …/cri-containerd-ID.scope     (CRI)
                 /default/ID  /k8s.io/ID          …/nerdctl-ID.scope            (nerdctl, CRI without parent)
    CRI-O        /kubepods/…/podUID/crio-ID       …/crio-ID.scope
    podman       /libpod_parent/libpod-ID         …/libpod-ID.scope   …/libpod-payload-ID

cgroupfs naming on the left, systemd naming on the right; a cgroupfs driver that was handed a systemd
path writes `…slice:cri-containerd:ID`.  The same names stand in cgroup v2, hybrid and v1 trees, and in
paths relative to a private cgroup namespace (`/../../docker/ID`).

**The outermost name wins.**  Whoever runs inside a container, and may write to its cgroup, can make
directories of any name below it; above it he can make none.  So a container inside a container (Docker
in Docker, kind) counts as the outer one, which is also the only one that this node's runtime knows.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

RUNTIMES: Final = ("containerd", "cri-o", "docker", "podman")

#: How `ContainerName.runtime` was decided: the runtime's own prefix, the directory that this runtime
#: alone uses, or the usual runtime of such a place (kubepods: containerd; elsewhere: Docker with a
#: cgroup parent of the user's choice).
BASES: Final = ("prefix", "parent", "assumed")

_PREFIXES: Final = {
    "docker": "docker",
    "cri-containerd": "containerd",
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod": "podman",
    "libpod-payload": "podman",
}
_PARENTS: Final = {"docker": "docker", "moby": "docker", "default": "containerd", "k8s.io": "containerd"}
#: Bare ids below these are no containers: podman's pods, BuildKit's steps.
_NOT_PARENTS: Final = frozenset({"libpod_parent", "buildkit"})

_PREFIXED = re.compile(r"(?:[^:]*:)?(" + "|".join(_PREFIXES) + r")[-:]([0-9a-f]{64})(?:\.scope)?")
_BARE = re.compile(r"[0-9a-f]{64}")
#: conmon watches a container from the host's own namespaces: it is a host process.
_MONITOR = re.compile(r"(?:[^:]*:)?(?:libpod|crio)-conmon[-:][0-9a-f]{64}(?:\.scope)?")
_UNSUPPORTED = re.compile(r"lxc|lxc\.payload\..*|machine-(?!qemu|libpod_pod_).*\.scope|systemd-nspawn@.*\.service")


class ContainerName(msgspec.Struct, frozen=True):
    """A container, named by its cgroup: `runtime` is one of `RUNTIMES`, `id` 64 hex, `basis` one of `BASES`."""

    runtime: str
    id: str
    basis: str

    def __str__(self) -> str:
        return f"{self.runtime}://{self.id}"


def container_name(path: str) -> ContainerName | None:
    """Return the outermost container that `path` lies in, or None.  Never raises."""
    parts = _parts(path)
    for at, part in enumerate(parts):
        found = _PREFIXED.fullmatch(part)
        if found:
            return ContainerName(_PREFIXES[found[1]], found[2], "prefix")
        if _BARE.fullmatch(part) and (at == 0 or parts[at - 1] not in _NOT_PARENTS):
            return _bare(part, parts[:at])
    return None


def why_not_host(path: str) -> str:
    """Return why a path without a container is not plainly the host's; "" when it is.  Never raises.

    `build_step`: a step of an image build, which has no container id.  `not_a_container_id`: a place that
    a runtime owns, under a name that is no id (`ctr run` takes any name; a pod's own cgroup).
    `unsupported_runtime`: LXC, systemd-nspawn.  `private_cgroup_namespace`: the path leads out of our
    view.  `not_a_cgroup_path`: it does not start with a slash.
    """
    if not path.startswith("/"):
        return "not_a_cgroup_path"
    parts = _parts(path)
    if any(_MONITOR.fullmatch(part) for part in parts):
        return ""
    if "buildkit" in parts[:-1]:
        return "build_step"
    if any(_UNSUPPORTED.fullmatch(part) for part in parts):
        return "unsupported_runtime"
    if parts[0] in _PARENTS or parts[0] == "libpod_parent" or any(p.startswith("kubepods") for p in parts):
        return "not_a_container_id"
    if ".." in parts:
        return "private_cgroup_namespace"
    return ""


def is_users_own(path: str) -> bool:
    """Say whether `path` lies in a subtree that systemd gave to a user, who names cgroups there as he likes."""
    return any(part.startswith("user@") for part in _parts(path))


def _parts(path: str) -> list[str]:
    # /proc/PID/cgroup and /proc/self/fd mark a removed cgroup so.
    return path.removesuffix(" (deleted)").strip("/").split("/")


def _bare(container_id: str, parents: list[str]) -> ContainerName:
    if parents and parents[-1] in _PARENTS:
        return ContainerName(_PARENTS[parents[-1]], container_id, "parent")
    in_kubernetes = any(part.startswith("kubepods") for part in parents)
    return ContainerName("containerd" if in_kubernetes else "docker", container_id, "assumed")
