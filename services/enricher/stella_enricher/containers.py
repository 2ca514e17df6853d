"""Cgroup path → container and image.  `lookup` answers at once, from memory; the rest happens beside it.

    lookup ──miss──▶ container_name of the path (runtime, id) ──▶ memory
                                              │
                                              └──▶ Asking (image, labels, pod) ──▶ memory
    settle(): wait ≤ 20 ms for what the runtimes say

The path comes with the batch: the kernel wrote it down with the event, so it is there when the container is gone.
Nothing here is saved: a fresh process finds it all out again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import anyio
import msgspec

from stella_enricher.container_names import ContainerName, container_name, is_users_own, why_not_host
from stella_enricher.remembering import Memory, text_bytes
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.facts import FINAL_REASONS, Facts, Pod
from stella_shared.config import Resources

#: The share of `max_cache_memory_mb` that cgroups' containers have; what runtimes say of them has as much.
MEMORY_SHARE: Final = 0.125
_TICK_SECONDS: Final = 1.0
#: A `Container` without the content of its strings.
_CONTAINER_BYTES: Final = 200
#: Reasons that another look at the runtimes cannot change.
_FINAL_IMAGE_REASONS: Final = FINAL_REASONS | {"rootless_runtime"}


def memory_bytes(resources: Resources) -> int:
    """Return the bound of each of the containers' two memories."""
    return int(resources.max_cache_memory_mb * (1 << 20) * MEMORY_SHARE)


class Container(msgspec.Struct, frozen=True):
    """Where an event came from.

    `container_id` is `<runtime>://<64 hex>`, or "" with reason `host` for a process of the node itself, or
    `unknown:<cgroup id>` with the reason why.  `id_basis` says how the runtime was decided
    (`container_names.BASES`, or `runtime` where a runtime corrected what was assumed).  `image_digest` is
    `sha256:…` of kind `config` or `manifest`, or "" with `image_reason`; a container has one of the two, host
    and unknown have neither.  `labels` are those chosen by configuration; `pod` only Kubernetes' have.
    """

    container_id: str
    reason: str = ""
    id_basis: str = ""
    image_digest: str = ""
    image_digest_kind: str = ""
    image_name: str = ""
    image_repo_digests: tuple[str, ...] = ()
    image_reason: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    pod: Pod | None = None


HOST: Final = Container("", "host")


def named(cgroup_id: int, path: str | None) -> tuple[Container, ContainerName | None]:
    """Return what the path of a cgroup says by itself: the container without its image, and its name if it has one."""
    if path is None:
        return (unknown(cgroup_id, "cgroup_not_named") if cgroup_id else unknown(0, "no_cgroup")), None
    name = container_name(path)
    if name is not None:
        return Container(str(name), id_basis=name.basis), name
    reason = why_not_host(path)
    return (unknown(cgroup_id, reason) if reason else HOST), None


def elsewhere(cgroup_id: int, path: str | None) -> Container:
    """Return the container of another node's cgroup: its runtime is not ours to ask."""
    container, name = named(cgroup_id, path)
    return container if name is None else _with(container, Facts(reason="other_node"))


def unknown(cgroup_id: int, reason: str) -> Container:
    """Return the container of a cgroup about which nothing can be said, and why."""
    return Container(f"unknown:{cgroup_id}", reason)


class ContainerResolver:
    """Names the containers of this node.  `run` must be running for images and expiry to happen.

    A cgroup id means something on the node and in the boot it came from only: for batches of another
    node or boot use `elsewhere`.  Without `asking` no runtime is asked.
    """

    def __init__(
        self,
        resources: Resources,
        asking: Asking | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._asking = asking
        self._known: Memory[int, Container] = Memory(
            _size_of,
            max_bytes=memory_bytes(resources),
            ttl_seconds=resources.container_cache_ttl_seconds,
            clock=clock,
        )
        self._unknown: dict[str, int] = {}

    def lookup(self, cgroup_id: int, path: str | None) -> Container:
        """Return the container of a cgroup.  Never blocks, never raises; some dict accesses when known."""
        container = self._known.get(cgroup_id)
        if container is None:
            container = self._resolve(cgroup_id, path)
            if container.container_id.startswith("unknown:"):
                self._unknown[container.reason] = self._unknown.get(container.reason, 0) + 1
            if path is None:
                return container  # A later batch may know it.
            self._known.put(cgroup_id, container)
        elif container.image_reason not in _FINAL_IMAGE_REASONS and self._asking is not None:
            facts = self._asking.facts(_name_of(container))
            if facts.reason != container.image_reason:
                container = _with(container, facts)
                self._known.put(cgroup_id, container)
        return container

    async def settle(self, cgroups: Mapping[int, str], timeout_seconds: float = 0.02) -> None:
        """Wait until the images of these cgroups are known, `timeout_seconds` at the most."""
        containers = [self.lookup(cgroup_id, path) for cgroup_id, path in cgroups.items()]
        awaited = {_name_of(c).id for c in containers if c.image_reason == "pending"}
        if awaited and self._asking is not None:
            await self._asking.settle(awaited, timeout_seconds)

    async def run(self) -> None:
        """Work beside the lookups until cancelled: ask the runtimes, forget."""
        async with anyio.create_task_group() as tasks:
            if self._asking is not None:
                tasks.start_soon(self._asking.run)
            while True:
                self._known.tick()
                await anyio.sleep(_TICK_SECONDS)

    def stats(self) -> dict[str, dict[str, object]]:
        """Return each memory's figures for the heartbeat, and `reasons`: unknowns with their counts.

        `containers` are cgroups, with the lookups that named none since the start by reason; `images` are
        containers as the runtimes describe them, with those that have no image now by reason.
        """
        stats: dict[str, dict[str, object]] = {
            "containers": {**self._known.stats(), "reasons": dict(self._unknown)},
        }
        if self._asking is not None:
            stats["images"] = {**self._asking.stats(), "reasons": self._asking.reasons()}
        return stats

    def _resolve(self, cgroup_id: int, path: str | None) -> Container:
        container, name = named(cgroup_id, path)
        if name is None or path is None:
            return container
        return self._with_image(name, is_users_own(path))

    def _with_image(self, name: ContainerName, rootless: bool) -> Container:
        container = Container(str(name), id_basis=name.basis)
        if rootless:
            # A user's own engine has a socket of its own; what the system's engine says of such an id
            # would be about somebody else.
            return _with(container, Facts(reason="rootless_runtime"))
        if self._asking is None:
            return _with(container, Facts(reason="no_runtime_socket"))
        return _with(container, self._asking.facts(name))


def _name_of(container: Container) -> ContainerName:
    runtime, _, container_id = container.container_id.partition("://")
    return ContainerName(runtime, container_id, container.id_basis)


def _with(container: Container, facts: Facts) -> Container:
    container_id, basis = container.container_id, container.id_basis
    if basis == "assumed" and facts.runtime:
        # The one that knows it is the one that runs it.
        name = ContainerName(facts.runtime, _name_of(container).id, "runtime")
        container_id, basis = str(name), basis if str(name) == container_id else name.basis
    return msgspec.structs.replace(
        container,
        container_id=container_id,
        id_basis=basis,
        image_digest=facts.digest,
        image_digest_kind=facts.digest_kind,
        image_name=facts.image,
        image_repo_digests=facts.repo_digests,
        image_reason=facts.reason,
        labels=facts.labels,
        pod=facts.pod,
    )


def _size_of(_: int, container: Container) -> int:
    size = _CONTAINER_BYTES + text_bytes(
        container.container_id, container.image_digest, container.image_name, *container.image_repo_digests
    )
    size += sum(72 + text_bytes(key, value) for key, value in container.labels)
    if container.pod is not None:
        size += 72 + text_bytes(container.pod.namespace, container.pod.name, container.pod.container)
    return size
