"""A real Docker Engine runs real containers, and the resolver names them and their images."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from stella_enricher.container_names import ContainerName
from stella_enricher.containers import ContainerResolver
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection
from stella_shared import selectors
from stella_shared.config import Resources
from tests.enricher.cgroup_kit import mounts
from tests.enricher.docker_kit import NAME, Engine, engine_with_image, only, why_no_engine

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Give a running engine that has our image; afterwards nothing of it is left."""
    reason = why_no_engine()
    if reason:
        pytest.skip(f"containers of a real engine are not tested: {reason}")
    with engine_with_image() as engine:
        yield engine


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_asking(engine: Engine, *targets: str) -> Asking:
    """Return what asks the engine."""
    sockets = only(engine)
    selection = Selection(selectors.selectors(targets))
    finder = SocketFinder(sockets)
    return Asking(finder, labels=sockets.labels, selection=selection, max_bytes=1 << 20, ttl_seconds=300.0)


@asynccontextmanager
async def resolving(engine: Engine) -> AsyncIterator[ContainerResolver]:
    """Give a resolver that runs against the engine."""
    resolver = ContainerResolver(Resources(), make_asking(engine))
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
    for mount in mounts():
        with contextlib.suppress(FileNotFoundError):
            Path(mount.point, parent).rmdir()


async def test_a_container_is_known_when_it_is_created_and_selected_until_it_is_removed(engine: Engine) -> None:
    """The stream of events brings image, name and labels before the container has started."""
    targets = ("name:we?", f"image:{NAME}", "label:test.team=w*", "label:test.team")
    asking = make_asking(engine, *targets)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking.run)
        with anyio.fail_after(10):
            while not asking.ready:
                await anyio.sleep(0.01)
        await anyio.sleep(0.2)
        made = engine.docker(
            "create", "--network", "none", "--name", "web", "--label", "test.team=web", "--label", "x=y", NAME
        )
        with anyio.fail_after(5):
            while any(made not in ids for ids in asking.selection.sets().values()):
                await anyio.sleep(0.01)
        facts = asking.facts(ContainerName("docker", made, "parent"))
        assert (engine.docker("image", "inspect", "-f", "{{.Id}}", NAME), "config") == (facts.digest, facts.digest_kind)
        assert ("web", (("test.team", "web"),), "docker") == (facts.name, facts.labels, facts.runtime)
        assert 0 == asking.stats()["misses"]

        engine.docker("rename", "web", "db")
        with anyio.fail_after(5):
            while asking.selection.sets()["name:we?"]:
                await anyio.sleep(0.01)
        assert [made] == asking.selection.sets()["label:test.team"]
        engine.docker("rm", "-f", made)
        with anyio.fail_after(5):
            while any(made in ids for ids in asking.selection.sets().values()):
                await anyio.sleep(0.01)
        (status,) = asking.status()
        assert ("docker", "ok", True, {}) == (
            status["runtime"],
            status["state"],
            status["streaming"],
            status["failures"],
        )
        tasks.cancel_scope.cancel()


async def test_an_engine_that_restarts_is_followed_again(engine: Engine) -> None:
    """What is asked while it is away has a reason; afterwards its list brings what came meanwhile."""
    asking = make_asking(engine, "label:test.team=web")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking.run)
        with anyio.fail_after(10):
            while not asking.ready:
                await anyio.sleep(0.01)
        engine.remove_all()
        engine.stop()
        name = ContainerName("docker", "e5" * 32, "parent")
        with anyio.fail_after(5):
            while asking.facts(name).reason == "pending":
                await anyio.sleep(0.01)
        assert "no_runtime_socket" == asking.facts(name).reason
        assert "waiting" == asking.status()[0]["state"]
        engine.start()
        made = engine.docker("create", "--network", "none", "--label", "test.team=web", NAME)
        with anyio.fail_after(15):
            while asking.selection.sets()["label:test.team=web"] != [made]:
                await anyio.sleep(0.05)
        engine.docker("rm", made)
        tasks.cancel_scope.cancel()
