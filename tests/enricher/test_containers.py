"""The resolver answers at once, learns beside it, and says of everything it does not know why."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote

import anyio
import anyio.abc
import pytest

from stella_enricher.containers import HOST, Container, ContainerResolver, elsewhere, memory_bytes, unknown
from stella_enricher.runtimes.asking import NOT_FOUND_TRIES, Asking
from stella_enricher.runtimes.docker import DockerApi
from stella_enricher.runtimes.facts import Runtime
from stella_shared.config import Resources

pytestmark = pytest.mark.anyio

A = "a1" * 32
B = "b2" * 32
DEFAULTS = Resources()
_ids = itertools.count(100)
CONFIG = "sha256:" + "c0" * 32


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    """A Docker Engine's two answers on a UNIX socket, which can be slow, sick or ignorant."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[str] = []
        self.status = "200 OK"
        self.delay_seconds = 0.0
        self.knows = True

    async def serve(self, stream: anyio.abc.SocketStream) -> None:
        async with stream:
            try:
                while True:
                    path = (await stream.receive()).split(b" ")[1].decode()
                    if path.startswith("/events"):
                        await anyio.sleep_forever()
                    await anyio.sleep(self.delay_seconds)
                    wanted = re.search(r"[0-9a-f]{64}", unquote(path))
                    said: object = []
                    if wanted is not None:
                        self.asked.append(wanted[0])
                        listed = [{"Id": wanted[0], "ImageID": CONFIG, "Image": "web:1"}]
                        said = {} if path.startswith("/images/") else listed if self.knows else []
                    body = json.dumps(said).encode()
                    await stream.send(f"HTTP/1.1 {self.status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass


class Found:
    """A finder that finds these runtimes at once."""

    wanted = True

    def __init__(self, *runtimes: Runtime) -> None:
        self.runtimes = list(runtimes)

    def look(self) -> list[Runtime]:
        new, self.runtimes = self.runtimes, []
        return new


@asynccontextmanager
async def running(path: Path, resources: Resources = DEFAULTS) -> AsyncIterator[tuple[Engine, ContainerResolver]]:
    """Give an engine and a resolver that runs against it."""
    engine = Engine(path / "docker.sock")
    listener = await anyio.create_unix_listener(engine.path)
    asking = Asking(
        Found(DockerApi(str(engine.path), timeout_seconds=0.3)),  # type: ignore[arg-type]
        max_bytes=memory_bytes(resources),
        ttl_seconds=resources.container_cache_ttl_seconds,
    )
    async with listener, anyio.create_task_group() as servers:
        servers.start_soon(listener.serve, engine.serve)
        resolver = ContainerResolver(resources, asking)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(resolver.run)
            yield engine, resolver
            tasks.cancel_scope.cancel()
        # Let the streams see their clients' end first: anyio's UNIX streams do not like both at once.
        await anyio.sleep(0.02)
        servers.cancel_scope.cancel()


def make(path: str) -> tuple[int, str]:
    """Return a cgroup that nobody else has: id and path."""
    return next(_ids), f"/{path}"


NAMINGS = [
    (f"docker/{A}", f"docker://{A}", "parent"),
    (f"system.slice/docker-{A}.scope", f"docker://{A}", "prefix"),
    (f"kubepods/besteffort/pod1/{A}", f"containerd://{A}", "assumed"),
    (f"kubepods.slice/kubepods-pod1.slice/cri-containerd-{A}.scope", f"containerd://{A}", "prefix"),
    (f"kubepods.slice/kubepods-pod1.slice/crio-{A}.scope", f"cri-o://{A}", "prefix"),
    (f"libpod_parent/libpod-{A}", f"podman://{A}", "prefix"),
    (f"machine.slice/libpod-{A}.scope/container", f"podman://{A}", "prefix"),
]


@pytest.mark.parametrize(("name", "container_id", "basis"), NAMINGS)
def test_every_runtimes_cgroup_gets_its_id(name: str, container_id: str, basis: str) -> None:
    """A cgroup named by a runtime is resolved; without a runtime socket the digest's absence says so."""
    resolver = ContainerResolver(Resources(), None)
    expected = Container(container_id, id_basis=basis, image_reason="no_runtime_socket")
    assert expected == resolver.lookup(*make(name))
    assert expected.container_id == elsewhere(*make(name)).container_id


def test_host_and_unknown_are_told_apart() -> None:
    """The root and a service are the host; a build step, and a cgroup without a name, are unknown with a reason."""
    resolver = ContainerResolver(Resources(), None)
    step = make("docker/buildkit/k2v9")
    assert HOST == resolver.lookup(1, "/")
    assert HOST == resolver.lookup(*make("system.slice/ssh.service"))
    assert Container(f"unknown:{step[0]}", "build_step") == resolver.lookup(*step)
    assert unknown(7, "cgroup_not_named") == resolver.lookup(7, None)
    assert unknown(0, "no_cgroup") == resolver.lookup(0, None)
    stats = resolver.stats()["containers"]
    assert {"build_step": 1, "cgroup_not_named": 1, "no_cgroup": 1} == stats["reasons"]
    assert (0, 5, 3) == (stats["hits"], stats["misses"], stats["entries"])
    assert HOST == resolver.lookup(7, "/"), "a name that comes later is believed"


def test_another_nodes_container_has_its_name_and_no_image() -> None:
    """The path says which container it was; whose image it has, only the runtime over there knows."""
    assert Container(f"docker://{A}", id_basis="parent", image_reason="other_node") == elsewhere(*make(f"docker/{A}"))
    assert HOST == elsewhere(1, "/")


def test_a_users_own_container_is_not_asked_about(tmp_path: Path) -> None:
    """A name in a user's subtree is never given the image that the system's engine knows under that id."""
    asking = Asking(Found(DockerApi(str(tmp_path / "none"))), max_bytes=1 << 20, ttl_seconds=1.0)  # type: ignore[arg-type]
    resolver = ContainerResolver(Resources(), asking)
    found = resolver.lookup(*make(f"user@7.service/docker-{A}.scope"))
    assert (f"docker://{A}", "rootless_runtime") == (found.container_id, found.image_reason)


def test_the_cache_is_bounded_and_keeps_what_is_in_use() -> None:
    """The cache holds no more than its memory allows, and keeps what is in use."""
    resolver = ContainerResolver(Resources(max_cache_memory_mb=1), None)
    in_use = make(f"docker-{A}.scope")
    for cgroup_id in range(1 << 40, (1 << 40) + 2000):
        assert f"docker://{A}" == resolver.lookup(*in_use).container_id
        resolver.lookup(cgroup_id, "/other")
    stats = resolver.stats()["containers"]
    assert stats["max_bytes"] >= stats["bytes"] > 0
    assert 2001 > stats["entries"]
    assert 2001 == stats["misses"]


async def test_a_new_containers_first_batch_has_its_digest(tmp_path: Path) -> None:
    """`settle` waits for the runtime's answer, and nested cgroups share it without another call."""
    async with running(tmp_path) as (engine, resolver):
        await anyio.sleep(0.05)
        outer = make(f"docker/{A}")
        nested = make(f"docker/{A}/init.scope")
        await resolver.settle({**dict([outer]), 1: "/"}, timeout_seconds=2.0)
        expected = Container(f"docker://{A}", "", "parent", CONFIG, "config", "web:1")
        assert expected == resolver.lookup(*outer)
        assert expected == resolver.lookup(*nested)
        assert [A, CONFIG.removeprefix("sha256:")] == engine.asked


async def test_a_hanging_runtime_delays_one_batch_by_20_ms(tmp_path: Path) -> None:
    """Events of a container whose runtime hangs go out at once, `pending` first, then with the reason."""
    async with running(tmp_path) as (engine, resolver):
        engine.delay_seconds = 60.0
        first = make(f"docker/{A}")
        begun = time.monotonic()
        await resolver.settle(dict([first]))
        assert 0.2 > time.monotonic() - begun
        assert "pending" == resolver.lookup(*first).image_reason
        begun = time.monotonic()
        for i in range(20):
            await resolver.settle(dict([make(f"docker/{i:064x}"), first]))
        assert 0.2 > time.monotonic() - begun
        await anyio.sleep(0.4)
        assert "runtime_timeout" == resolver.lookup(*first).image_reason


async def test_a_runtime_that_recovers_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed question is put again later, and the cached container gets its digest."""
    monkeypatch.setattr("stella_enricher.runtimes.asking.RETRY_SECONDS", 0.1)
    async with running(tmp_path) as (engine, resolver):
        engine.status = "500 no"
        cgroup_id = make(f"docker/{A}")
        await resolver.settle(dict([cgroup_id]), timeout_seconds=2.0)
        assert "runtime_error" == resolver.lookup(*cgroup_id).image_reason
        nested = make(f"docker/{A}/below")
        assert "runtime_error" == resolver.lookup(*nested).image_reason
        engine.status = "200 OK"
        with anyio.fail_after(5):
            while not resolver.lookup(*cgroup_id).image_digest:
                await anyio.sleep(0.05)
        assert CONFIG == resolver.lookup(*nested).image_digest


async def test_a_container_the_runtime_does_not_know_is_asked_about_a_few_times(tmp_path: Path) -> None:
    """404 may come before the runtime knows what it has started; then it is an answer, which is kept."""
    async with running(tmp_path) as (engine, resolver):
        engine.knows = False
        cgroup_id = make(f"docker/{A}")
        await resolver.settle(dict([cgroup_id]), timeout_seconds=2.0)
        assert "not_known_yet" == resolver.lookup(*cgroup_id).image_reason
        with anyio.fail_after(5):
            while "container_not_found" != resolver.lookup(*cgroup_id).image_reason:
                await anyio.sleep(0.01)
        assert [A] * NOT_FOUND_TRIES == engine.asked


async def test_the_ttl_forgets_containers_and_their_images(tmp_path: Path) -> None:
    """What nobody asked about for the TTL is gone from the cache, its image too."""
    resources = Resources(container_cache_ttl_seconds=1)
    async with running(tmp_path, resources) as (_, resolver):
        await resolver.settle(dict([make(f"docker/{A}")]), timeout_seconds=2.0)
        assert 1 == resolver.stats()["images"]["entries"]
        with anyio.fail_after(30):
            while any(resolver.stats()[memory]["entries"] for memory in ("images", "containers")):
                await anyio.sleep(0.05)
