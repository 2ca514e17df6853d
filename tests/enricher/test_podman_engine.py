"""A real podman: its containers are named with image, labels and name, and followed by its events."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from stella_enricher.containers import ContainerResolver
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection
from stella_shared import selectors
from stella_shared.config import Resources, Runtimes
from tests.enricher.cgroup_kit import left_as_found
from tests.enricher.containerd_kit import until
from tests.enricher.podman_kit import NAME, Podman, started, why_no_podman

pytestmark = [pytest.mark.engine, pytest.mark.anyio]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    """Give a podman that has our image; afterwards nothing of it is left."""
    reason = why_no_podman()
    if reason:
        pytest.skip(f"podman is not tested: {reason}")
    with (
        left_as_found("libpod_parent", "conmon"),
        tempfile.TemporaryDirectory(prefix="stella-podman-") as folder,
        started(Path(folder)) as podman,
    ):
        yield podman


async def test_a_container_of_podman_is_named_selected_and_followed(podman: Podman) -> None:
    """The cgroup gives the id, the socket the rest; a selector has it from its creation to its removal."""
    sockets = Runtimes(docker_socket="", podman_socket=str(podman.socket), containerd_socket="", cri_socket="")
    selection = Selection(selectors.selectors(["name:web"]))
    asking = Asking(SocketFinder(sockets), labels=["test.*"], selection=selection, max_bytes=1 << 20, ttl_seconds=300.0)
    resolver = ContainerResolver(Resources(), asking)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(resolver.run)
        await until(lambda: asking.ready)
        container_id = await anyio.to_thread.run_sync(
            podman.podman, "run", "-d", "--network", "none", "--name", "web", "--label", "test.team=web", NAME
        )
        await until(lambda: selection.sets() == {"name:web": [container_id]})
        cgroup = podman.cgroup(container_id)
        await resolver.settle(dict([cgroup]), timeout_seconds=2.0)
        found = resolver.lookup(*cgroup)
        assert (f"podman://{container_id}", "prefix", "") == (found.container_id, found.id_basis, found.image_reason)
        config = podman.podman("image", "inspect", "-f", "{{.Id}}", NAME)
        manifest = podman.podman("image", "inspect", "-f", "{{.Digest}}", NAME)
        assert (f"sha256:{config}", "config", NAME) == (
            found.image_digest,
            found.image_digest_kind,
            found.image_name,
        )
        assert (f"localhost/stella-test@{manifest}",) == found.image_repo_digests
        assert (("test.team", "web"),) == found.labels
        podman.podman("rm", "-f", "-t", "0", container_id)
        await until(lambda: selection.sets() == {"name:web": []})
        tasks.cancel_scope.cancel()
