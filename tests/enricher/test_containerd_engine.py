"""A real containerd: what `ctr` runs, and what a kubelet runs over CRI, is named with image, labels and pod."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from stella_enricher.container_names import ContainerName
from stella_enricher.containers import ContainerResolver
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.facts import Pod
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection
from stella_shared import selectors
from stella_shared.config import Resources, Runtimes
from tests.enricher.cgroup_kit import left_as_found
from tests.enricher.containerd_kit import IMAGE, Containerd, Kubelet, started, until, why_no_containerd

pytestmark = [pytest.mark.engine, pytest.mark.anyio]

PARENT = f"zz-stella-test-{os.getpid()}-cri"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    """Give a running containerd that has our image; afterwards nothing of it is left."""
    reason = why_no_containerd()
    if reason:
        pytest.skip(f"containerd is not tested: {reason}")
    with (
        left_as_found("default", PARENT),
        tempfile.TemporaryDirectory(prefix="stella-containerd-") as folder,
        started(Path(folder)) as containerd,
    ):
        yield containerd


@asynccontextmanager
async def asking(containerd: Containerd, *, cri: bool, targets: tuple[str, ...] = ()) -> AsyncIterator[Asking]:
    """Give what asks this containerd, with or without CRI."""
    sockets = Runtimes(
        docker_socket="", podman_socket="", containerd_socket=str(containerd.socket), cri_socket="auto" if cri else ""
    )
    finder = SocketFinder(sockets, usual={"cri": (), "containerd": (), "docker": (), "podman": ()})
    selection = Selection(selectors.selectors(targets))
    asking = Asking(finder, labels=["test.*"], selection=selection, max_bytes=1 << 20, ttl_seconds=300.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking.run)
        await until(lambda: asking.ready)
        yield asking
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def kubelet(containerd: Containerd) -> AsyncIterator[Kubelet]:
    """Give what runs pods, and remove them."""
    kubelet = Kubelet(containerd, f"/{PARENT}/kubepods/besteffort/pod1")
    try:
        yield kubelet
    finally:
        with anyio.CancelScope(shield=True):
            await kubelet.close()


@pytest.mark.parametrize("cri", [False, True])
async def test_a_container_of_ctr_is_named_with_its_manifest_digest(containerd: Containerd, cri: bool) -> None:
    """The cgroup gives the id, containerd's own API the image, its digest and the labels, CRI or not."""
    async with asking(containerd, cri=cri) as asked:
        resolver = ContainerResolver(Resources(), asked)
        container_id = containerd.run("--label", "test.team=web", "--label", "other=x")
        cgroup = containerd.cgroup(container_id)
        await resolver.settle(dict([cgroup]), timeout_seconds=5.0)
        found = resolver.lookup(*cgroup)
        assert (f"containerd://{container_id}", "") == (found.container_id, found.image_reason)
        assert (containerd.manifest_digest, "manifest") == (found.image_digest, found.image_digest_kind)
        assert (IMAGE, (("test.team", "web"),), None) == (found.image_name, found.labels, found.pod)
        containerd.kill(container_id)


async def test_a_container_is_known_before_anybody_asks(containerd: Containerd) -> None:
    """The stream of events brings it, and a selector has it until it is removed."""
    async with asking(containerd, cri=False, targets=("label:test.team=we?",)) as asked:
        await anyio.sleep(0.3)
        container_id = containerd.run("--label", "test.team=web")
        await until(lambda: asked.selection.sets()["label:test.team=we?"] == [container_id])
        other = containerd.run("--label", "test.team=db")
        await until(lambda: asked.facts(ContainerName("containerd", other, "parent")).digest)
        assert {"label:test.team=we?": [container_id]} == asked.selection.sets()
        before = asked.stats()["misses"]
        facts = asked.facts(ContainerName("containerd", container_id, "parent"))
        assert (containerd.manifest_digest, before) == (facts.digest, asked.stats()["misses"])
        containerd.kill(container_id)
        await until(lambda: asked.selection.sets()["label:test.team=we?"] == [])
        containerd.kill(other)


@pytest.mark.parametrize("kubelets_labels", [True, False])
async def test_a_pods_container_is_named_with_pod_and_config_digest(
    containerd: Containerd, kubelets_labels: bool
) -> None:
    """CRI tells the pod and the image that was taken; the pod comes from the labels or from its sandbox."""
    async with asking(containerd, cri=True, targets=("name:web-?",)) as asked, kubelet(containerd) as node:
        resolver = ContainerResolver(Resources(), asked)
        sandbox, container_id = await node.run_pod("team-a", "web-0", "web", kubelets_labels=kubelets_labels)
        cgroup = containerd.cgroup(container_id, "k8s.io")
        await resolver.settle(dict([cgroup]), timeout_seconds=5.0)
        found = resolver.lookup(*cgroup)
        assert (f"containerd://{container_id}", "") == (found.container_id, found.image_reason)
        assert (containerd.config_digest, "config") == (found.image_digest, found.image_digest_kind)
        assert (IMAGE, (("test.team", "web"),)) == (found.image_name, found.labels)
        assert Pod("team-a", "web-0", "web") == found.pod

        own = containerd.cgroup(sandbox, "k8s.io")
        await until(lambda: resolver.lookup(*own).image_reason == "pod_sandbox")
        assert Pod("team-a", "web-0") == resolver.lookup(*own).pod
        await until(lambda: asked.selection.sets()["name:web-?"] == sorted([sandbox, container_id]))


async def test_without_cri_kubernetes_containers_are_told_by_containerd_itself(containerd: Containerd) -> None:
    """Where CRI is not to be asked, containerd's own API has the kubelet's labels and the manifest's digest."""
    async with asking(containerd, cri=False) as asked, kubelet(containerd) as node:
        _, container_id = await node.run_pod("team-b", "db-0", "db", kubelets_labels=True)
        name = ContainerName("containerd", container_id, "prefix")
        await until(lambda: asked.facts(name).digest)
        facts = asked.facts(name)
        assert (containerd.manifest_digest, Pod("team-b", "db-0", "db")) == (facts.digest, facts.pod)
