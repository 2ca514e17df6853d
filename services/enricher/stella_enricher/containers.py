"""Cgroup path → container and image.  `lookup` answers at once, from memory; the rest happens beside it.

    lookup ──miss──▶ container_name of the path (runtime, id) ──▶ cache
                                              │
    run():  once a second forget, ask again   ├──▶ queue ──▶ DockerApi (image) ──▶ cache
    settle(): wait ≤ 20 ms for images         ┘

The path comes with the batch: the kernel wrote it down with the event, so it is there when the container is gone.

The cache is two dicts: an entry that is used moves to the young one, and what is still in the old one when
they change places is forgotten.  Nothing here is saved: a fresh process finds it all out again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import anyio
import msgspec

from stella_enricher.container_names import ContainerName, container_name, is_users_own, why_not_host
from stella_enricher.docker_api import DockerApi, Image
from stella_shared.config import Resources

#: The containers' share of `max_cache_memory_mb`, and what an entry takes with its strings, amply reckoned.
_MEMORY_SHARE: Final = 0.25
_ENTRY_BYTES: Final = 2048
_FEWEST_ENTRIES: Final = 256
_MOST_ENTRIES: Final = 65536
_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_CALLS_AT_ONCE: Final = 4
#: The runtime has spoken: these reasons are not asked about again.
_FINAL_IMAGE_REASONS: Final = frozenset({"", "container_not_found", "not_a_container_id"})


class Container(msgspec.Struct, frozen=True):
    """Where an event came from.

    `container_id` is `<runtime>://<64 hex>`, or "" with reason `host` for a process of the node itself, or
    `unknown:<cgroup id>` with the reason why.  `id_basis` says how the runtime was decided
    (`container_names.BASES`).  `image_digest` is `sha256:…` of kind `config` or `manifest`, or "" with
    `image_reason`; a container has one of the two, host and unknown have neither.
    """

    container_id: str
    reason: str = ""
    id_basis: str = ""
    image_digest: str = ""
    image_digest_kind: str = ""
    image_name: str = ""
    image_repo_digests: tuple[str, ...] = ()
    image_reason: str = ""


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
    return container if name is None else _with(container, Image(reason="other_node"))


def unknown(cgroup_id: int, reason: str) -> Container:
    """Return the container of a cgroup about which nothing can be said, and why."""
    return Container(f"unknown:{cgroup_id}", reason)


class _Question:
    """A container whose image is not known yet: the cgroups that wait for it, and how it stands."""

    __slots__ = ("cgroup_ids", "reason", "retry_at")

    def __init__(self) -> None:
        self.cgroup_ids: set[int] = set()
        #: `pending` until the runtime has answered once, then its last excuse.
        self.reason = "pending"
        self.retry_at = float("inf")


class ContainerResolver:
    """Names the containers of this node.  `run` must be running for images and expiry to happen.

    A cgroup id means something on the node and in the boot it came from only: for batches of another
    node or boot use `elsewhere`.
    """

    def __init__(
        self,
        resources: Resources,
        docker: DockerApi | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._docker = docker
        self._clock = clock
        self._half_life_seconds = resources.container_cache_ttl_seconds / 2
        room = int(resources.max_cache_memory_mb * (1 << 20) * _MEMORY_SHARE) // _ENTRY_BYTES
        self._max_young = min(max(room, _FEWEST_ENTRIES), _MOST_ENTRIES) // 2
        self._young: dict[int, Container] = {}
        self._old: dict[int, Container] = {}
        self._rotate_at = clock() + self._half_life_seconds
        #: By container id, 64 hex.  A container is in `_images` or in `_questions`, not in both.
        self._images: dict[str, Image] = {}
        self._questions: dict[str, _Question] = {}
        self._wanted: deque[str] = deque()
        self._bell = anyio.Event()
        self._answered = anyio.Event()
        self._docker_is_slow = False
        self._hits = self._misses = 0
        self._unknown: dict[str, int] = {}

    def lookup(self, cgroup_id: int, path: str | None) -> Container:
        """Return the container of a cgroup.  Never blocks, never raises; one dict access when known."""
        container = self._young.get(cgroup_id)
        if container is not None:
            self._hits += 1
            return container
        if len(self._young) >= self._max_young:
            self._rotate()
        container = self._old.pop(cgroup_id, None)
        if container is not None:
            self._hits += 1
        else:
            self._misses += 1
            container = self._resolve(cgroup_id, path)
            if container.container_id.startswith("unknown:"):
                self._unknown[container.reason] = self._unknown.get(container.reason, 0) + 1
            if path is None:
                return container  # A later batch may know it.
        self._young[cgroup_id] = container
        return container

    async def settle(self, cgroups: Mapping[int, str], timeout_seconds: float = 0.02) -> None:
        """Wait until the images of these cgroups are known, `timeout_seconds` at the most.

        Once it has waited in vain it waits no more until the runtime answers again: a hanging socket
        costs one such wait, not one per batch.
        """
        containers = [self.lookup(cgroup_id, path) for cgroup_id, path in cgroups.items()]
        awaited = {_hex_of(c) for c in containers if c.image_reason == "pending"}
        if not awaited or self._docker_is_slow or self._docker is None or not self._docker.well:
            return
        with anyio.move_on_after(timeout_seconds) as scope:
            while any(self._is_pending(container_id) for container_id in awaited):
                await self._answered.wait()
        self._docker_is_slow = scope.cancelled_caught

    async def run(self) -> None:
        """Work beside the lookups until cancelled: forget, ask for images, ask again."""
        async with anyio.create_task_group() as tasks:
            for _ in range(_CALLS_AT_ONCE):
                tasks.start_soon(self._fetch_images)
            while True:
                self._tick()
                await anyio.sleep(_TICK_SECONDS)

    def stats(self) -> dict[str, int]:
        """Return counters and gauges for the heartbeat; a label set is written `name{key=value}`.

        `hits` and `misses` count lookups, `unknown{reason=…}` the misses that found nothing, `entries`
        cgroups remembered, `images` and `images_missing` containers with and without a runtime's answer;
        the rest is `DockerApi.stats`.
        """
        return {
            "hits": self._hits,
            "misses": self._misses,
            "entries": len(self._young) + len(self._old),
            "max_entries": 2 * self._max_young,
            "images": len(self._images),
            "images_missing": len(self._questions),
            **{f"unknown{{reason={reason}}}": n for reason, n in self._unknown.items()},
            **(self._docker.stats() if self._docker is not None else {}),
        }

    def _resolve(self, cgroup_id: int, path: str | None) -> Container:
        container, name = named(cgroup_id, path)
        if name is None or path is None:
            return container
        return self._with_image(cgroup_id, name, is_users_own(path))

    def _with_image(self, cgroup_id: int, name: ContainerName, rootless: bool) -> Container:
        container = Container(str(name), id_basis=name.basis)
        if rootless:
            # A user's own engine has a socket of its own; what the system's engine says of such an id
            # would be about somebody else.
            return _with(container, Image(reason="rootless_runtime"))
        if self._docker is None:
            return _with(container, Image(reason="no_runtime_socket"))
        image = self._images.get(name.id)
        if image is not None:
            return _with(container, image)
        question = self._questions.get(name.id)
        if question is None:
            question = self._questions[name.id] = _Question()
            self._want(name.id)
        question.cgroup_ids.add(cgroup_id)
        return _with(container, Image(reason=question.reason))

    def _is_pending(self, container_id: str) -> bool:
        question = self._questions.get(container_id)
        return question is not None and question.reason == "pending"

    def _want(self, container_id: str) -> None:
        self._wanted.append(container_id)
        self._bell.set()
        self._bell = anyio.Event()

    async def _fetch_images(self) -> None:
        while True:
            while self._wanted:
                await self._fetch_image(self._wanted.popleft())
            await self._bell.wait()

    async def _fetch_image(self, container_id: str) -> None:
        if self._docker is None or container_id not in self._questions:
            return
        image = await self._docker.image_of(container_id)
        question = self._questions.get(container_id)
        if question is None:
            return  # Forgotten meanwhile.
        for cgroup_id in question.cgroup_ids:
            for cache in (self._young, self._old):
                if cgroup_id in cache:
                    cache[cgroup_id] = _with(cache[cgroup_id], image)
        if image.reason in _FINAL_IMAGE_REASONS:
            self._images[container_id] = image
            del self._questions[container_id]
            self._docker_is_slow = False
        else:
            question.reason = image.reason
            question.retry_at = self._clock() + max(_RETRY_SECONDS, self._docker.retry_seconds)
        self._answered.set()
        self._answered = anyio.Event()

    def _tick(self) -> None:
        now = self._clock()
        if now >= self._rotate_at:
            self._rotate()
        for container_id, question in self._questions.items():
            if question.retry_at <= now:
                question.retry_at = float("inf")
                self._want(container_id)

    def _rotate(self) -> None:
        """Forget what was not used since the last time, and the images that nobody has any more."""
        self._old, self._young = self._young, {}
        self._rotate_at = self._clock() + self._half_life_seconds
        alive = {_hex_of(container) for container in self._old.values()}
        self._images = {c: image for c, image in self._images.items() if c in alive}
        self._questions = {c: question for c, question in self._questions.items() if c in alive}


def _hex_of(container: Container) -> str:
    return container.container_id.rpartition("://")[2]


def _with(container: Container, image: Image) -> Container:
    return msgspec.structs.replace(
        container,
        image_digest=image.digest,
        image_digest_kind=image.digest_kind,
        image_name=image.name,
        image_repo_digests=image.repo_digests,
        image_reason=image.reason,
    )
