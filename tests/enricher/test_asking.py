"""Runtimes are found, asked in the right order, remembered within bounds, and never waited for in vain."""

from __future__ import annotations

import gc
import socket
import time
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from stella_enricher.container_names import ContainerName
from stella_enricher.containers import Container, ContainerResolver, memory_bytes
from stella_enricher.remembering import Memory
from stella_enricher.runtimes import asking as asking_module
from stella_enricher.runtimes.asking import Asking
from stella_enricher.runtimes.facts import Change, Facts, Listed, Pod, Refusal, chosen, labels_of
from stella_enricher.runtimes.finding import SocketFinder
from stella_enricher.selection import Selection
from stella_shared import selectors
from stella_shared.config import Resources, Runtimes

pytestmark = pytest.mark.anyio

A, B = "a1" * 32, "b2" * 32
DIGEST = "sha256:" + "d0" * 32
IMAGE = Facts(digest=DIGEST, digest_kind="config", image="web:1", name="web", labels=(("team", "web"), ("x", "y")))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Scripted:
    """A runtime that knows some containers, or refuses."""

    api = "scripted"
    streams = True
    watch_seconds = 30.0

    def __init__(self, runtime: str, known: dict[str, Facts], refusal: str = "") -> None:
        self.serves = frozenset({runtime})
        self.socket = f"/{runtime}"
        self.known = known
        self.refusal = refusal
        self.asked: list[str] = []
        self.runtime = runtime
        self.told: list[Change] = []
        self.bell = anyio.Event()
        self.closed = False

    async def facts_of(self, container_id: str) -> Facts:
        self.asked.append(container_id)
        if self.refusal == "hang":
            await anyio.sleep_forever()
        if self.refusal or container_id not in self.known:
            raise Refusal(self.refusal or "container_not_found")
        return self.known[container_id]

    async def containers(self) -> list[Listed]:
        if self.refusal:
            raise Refusal(self.refusal)
        return [Listed(container_id) for container_id in self.known]

    async def changes(self) -> AsyncGenerator[Change, None]:
        while True:
            while self.told:
                yield self.told.pop(0)
            await self.bell.wait()

    def tell(self, change: Change) -> None:
        self.told.append(change)
        self.bell.set()
        self.bell = anyio.Event()

    async def close(self) -> None:
        self.closed = True


class Found:
    """A finder that finds these at once."""

    def __init__(self, *runtimes: Scripted) -> None:
        self.runtimes = list(runtimes)

    def look(self) -> list[Scripted]:
        new, self.runtimes = self.runtimes, []
        return new


@asynccontextmanager
async def asking(*runtimes: Scripted, targets: tuple[str, ...] = (), **more: object) -> AsyncIterator[Asking]:
    options = {"max_bytes": 1 << 20, "ttl_seconds": 300.0, "labels": ["te*"], **more}
    selection = Selection(selectors.selectors(targets))
    asking = Asking(Found(*runtimes), selection=selection, **options)  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asking.run)
        await anyio.lowlevel.checkpoint()
        yield asking
        tasks.cancel_scope.cancel()


def asked_times(runtime: Scripted, container_id: str) -> int:
    return runtime.asked.count(container_id)


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.005)


async def test_the_names_runtime_is_asked_first_and_others_only_when_it_was_assumed() -> None:
    """A prefix or a parent names the runtime; a bare id elsewhere is looked for everywhere."""
    docker, podman = Scripted("docker", {}), Scripted("podman", {B: IMAGE})
    podman.known = {}
    async with asking(docker, podman) as asked:
        await until(lambda: asked.ready)
        podman.known = {B: IMAGE}
        asked.facts(ContainerName("docker", A, "parent"))
        await until(lambda: asked.facts(ContainerName("docker", A, "parent")).reason == "container_not_found")
        assert [] == podman.asked
        name = ContainerName("docker", B, "assumed")
        await until(lambda: asked.facts(name).digest)
        assert (B in docker.asked, [B]) == (True, podman.asked)
    assert docker.closed
    assert podman.closed


async def test_a_wrong_assumption_about_the_runtime_is_put_right() -> None:
    """The id of a container that another runtime knows begins with that runtime's name."""
    facts, path = Facts(digest=DIGEST, digest_kind="config", runtime="podman"), f"/custom/{A}"

    async with asking(Scripted("docker", {}), Scripted("podman", {A: facts})) as asked:
        await until(lambda: asked.ready)
        resolver = ContainerResolver(Resources(), asked)
        await resolver.settle({7: path}, timeout_seconds=2.0)
        found = resolver.lookup(7, path)
        assert (f"podman://{A}", "runtime", DIGEST) == (found.container_id, found.id_basis, found.image_digest)


async def test_somebody_who_cannot_be_asked_may_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a likely runtime is away, another's "not found" is no final answer."""
    monkeypatch.setattr(asking_module, "RETRY_SECONDS", 0.1)
    sick, ignorant = Scripted("docker", {A: IMAGE}, "runtime_timeout"), Scripted("podman", {})
    name = ContainerName("docker", A, "assumed")
    async with asking(sick, ignorant) as asked:
        await until(lambda: asked.facts(name).reason == "runtime_timeout")
        assert {"runtime_timeout": 1} == asked.reasons()
        sick.refusal = ""
        await until(lambda: asked.facts(name).digest)
        assert {} == asked.reasons()


async def test_a_change_brings_the_answer_before_the_question() -> None:
    """A container that was created is known without a miss; labels are those that were chosen."""
    docker = Scripted("docker", {})
    async with asking(docker, targets=("label:team=web", "name:w*")) as asked:
        await until(lambda: asked.ready)
        docker.known[A] = IMAGE
        docker.tell(Change("here", A))
        await until(lambda: asked.stats()["entries"])
        facts = asked.facts(ContainerName("docker", A, "parent"))
        assert (DIGEST, (("team", "web"),), 0) == (facts.digest, facts.labels, asked.stats()["misses"])
        assert {"label:team=web": [A], "name:w*": [A]} == asked.selection.sets()
        docker.tell(Change("gone", A))
        await until(lambda: not asked.selection.sets()["name:w*"])
        assert DIGEST == asked.facts(ContainerName("docker", A, "parent")).digest


async def test_what_is_said_first_selects_and_what_is_said_better_stays() -> None:
    """containerd tells of a pod's container before CRI can: it is a target at once, and has CRI's image."""
    better = Facts(digest=DIGEST, digest_kind="config", labels=(("team", "web"),), name="web", runtime="containerd")
    first = Facts(digest="sha256:" + "0" * 64, digest_kind="manifest", labels=(("team", "web"),), provisional=True)
    cri, own = Scripted("containerd", {}), Scripted("containerd", {})
    cri.socket = "/cri"
    name = ContainerName("containerd", A, "prefix")
    async with asking(own, cri, targets=("label:team=web",)) as asked:
        await until(lambda: asked.ready)
        own.known[A] = first
        own.tell(Change("here", A))
        await until(lambda: asked.selection.sets() == {"label:team=web": [A]})
        assert "not_known_yet" == asked.facts(name).reason
        cri.known[A] = better
        await until(lambda: asked.facts(name).digest)
        assert (DIGEST, "config") == (asked.facts(name).digest, asked.facts(name).digest_kind)
        own.known[B] = first
        other = ContainerName("containerd", B, "prefix")
        await until(lambda: asked.facts(other).digest)
        assert "manifest" == asked.facts(other).digest_kind
        assert asked_times(own, B) == asking_module.NOT_FOUND_TRIES


async def test_what_a_list_leaves_out_is_no_target_any_more() -> None:
    """A removal that no event told of is seen in the next list; what came after the list began stays."""
    docker = Scripted("docker", {A: IMAGE, B: IMAGE})
    docker.watch_seconds = 0.05
    async with asking(docker, targets=("name:web",)) as asked:
        await until(lambda: asked.selection.sets()["name:web"] == [A, B])
        del docker.known[A]
        await until(lambda: asked.selection.sets()["name:web"] == [B])
    selection = Selection(selectors.selectors(["name:web"]))
    selection.consider("d", A, ("name:web",), at=2.0)
    selection.keep("d", [], begun=1.0)
    selection.keep("other", [], begun=9.0)
    assert {"name:web": [A]} == selection.sets()
    selection.keep("d", [], begun=3.0)
    assert {"name:web": []} == selection.sets()


async def test_targets_are_bounded() -> None:
    """More containers than are told are left out, and that is said."""
    selection = Selection(selectors.selectors(["name:web"]))
    for number in range(selectors.MAX_CONTAINERS + 5):
        selection.consider("d", f"{number:064x}", ("name:web",), at=0.0)
    assert (selectors.MAX_CONTAINERS, True) == (len(selection.sets()["name:web"]), selection.truncated)


async def test_the_first_selectors_have_the_room_there_is() -> None:
    """Targets stand before images of functions: these are cut when one container matches both, and that is said."""
    selection = Selection(selectors.selectors(["name:web", "image:*"]))
    for number in range(selectors.MAX_CONTAINERS - 1):
        selection.consider("d", f"{number:064x}", ("name:web", "image:*"), at=0.0)
    sets = selection.sets()
    assert (selectors.MAX_CONTAINERS - 1, 1) == (len(sets["name:web"]), len(sets["image:*"]))
    assert selection.truncated


async def test_a_hanging_runtime_is_waited_for_once() -> None:
    """One batch waits 20 ms, the next ones do not wait, and the questions stay bounded."""
    docker = Scripted("docker", {}, "hang")
    async with asking(docker) as asked:
        await anyio.sleep(0.05)
        names = [ContainerName("docker", f"{number:064x}", "parent") for number in range(50)]
        begun = time.monotonic()
        for name in names:
            asked.facts(name)
            await asked.settle([name.id], 0.02)
        assert 0.3 > time.monotonic() - begun
        assert {"pending": 50} == asked.reasons()


async def test_a_hanging_runtime_holds_up_no_other() -> None:
    """Questions that wait for one runtime, however many, leave another's containers their answers at once."""
    podman, docker = Scripted("podman", {}, "hang"), Scripted("docker", {A: IMAGE})
    async with asking(podman, docker) as asked:
        for number in range(100):
            asked.facts(ContainerName("podman", f"{number:064x}", "prefix"))
        await asked.settle([f"{0:064x}"], 0.02)
        assert 4 == len(podman.asked)
        name = ContainerName("docker", A, "parent")
        asked.facts(name)
        await asked.settle([A], 2.0)
        assert (DIGEST, {"pending": 100}) == (asked.facts(name).digest, asked.reasons())


async def test_questions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of ids is asked about up to the bound; the rest is asked about when there is room."""
    monkeypatch.setattr(asking_module, "MAX_WAITING", 10)
    docker = Scripted("docker", {}, "hang")
    async with asking(docker) as asked:
        await anyio.sleep(0.05)
        for number in range(30):
            docker.tell(Change("here", f"{number:064x}"))
        await anyio.sleep(0.05)
        assert (10, 20) == (asked.stats()["asked"], asked.stats()["refused"])
        assert "pending" == asked.facts(ContainerName("docker", A, "parent")).reason


# ---- memory


def test_memory_is_bounded_in_bytes_and_forgets_what_is_not_used() -> None:
    """No more than the bound is held; what is used stays, for another life each time."""
    now = [0.0]
    memory: Memory[int, str] = Memory(lambda _, v: len(v), max_bytes=100_000, ttl_seconds=10.0, clock=lambda: now[0])
    for number in range(5000):
        memory.put(number, "x" * 80)
        assert memory.get(0) is not None
        assert 100_000 >= memory.bytes
    assert (5000, 0) == (memory.hits, memory.misses)
    assert memory.stats()["pushed_out"] > 3000
    now[0] = 6.0
    memory.tick()
    assert memory.get(0)
    now[0] = 12.0
    memory.tick()
    assert (1, True) == (len(memory), memory.get(0) is not None)
    now[0] = 30.0
    memory.tick()
    now[0] = 40.0
    memory.tick()
    assert (0, 0, None) == (len(memory), memory.bytes, memory.get(0))
    memory.put(1, "a")
    memory.put(1, "bb")
    memory.drop(1)
    assert (0, 0) == (len(memory), memory.bytes)


def test_the_figures_of_memory_are_what_it_takes() -> None:
    """What is said to be taken is between what tracemalloc sees and twice that, for either memory."""
    from stella_enricher.containers import _size_of as container_size
    from stella_enricher.runtimes.asking import _size_of as facts_size

    def text(kind: str, number: int) -> str:
        return f"{kind}-{number:060}"

    def facts(number: int) -> Facts:
        return Facts(
            digest=text("sha256", number),
            digest_kind="config",
            image=text("image", number),
            repo_digests=(text("a", number), text("b", number)),
            labels=((text("k", number), text("v", number)),),
            pod=Pod(text("n", number), text("p", number), text("c", number)),
            name=text("name", number),
        )

    def container(number: int) -> Container:
        f = facts(number)
        return Container(
            text("id", number),
            image_digest=f.digest,
            image_name=f.image,
            image_repo_digests=f.repo_digests,
            labels=f.labels,
            pod=f.pod,
        )

    for size_of, make, key in (
        (facts_size, facts, lambda number: f"{number:064x}"),
        (container_size, container, lambda number: number + 1000),
    ):
        memory: Memory = Memory(size_of, max_bytes=1 << 30, ttl_seconds=10.0, clock=lambda: 0.0)  # type: ignore[arg-type]
        gc.collect()
        tracemalloc.start()
        for number in range(3000):
            memory.put(key(number), make(number))
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken <= memory.bytes <= 2 * taken, (taken, memory.bytes)
    assert memory_bytes(Resources(max_cache_memory_mb=64)) == 8 << 20


def test_labels_are_chosen_bounded_and_cut() -> None:
    """Only matching keys of ASCII, sixteen of them, values of 256 characters."""
    import fnmatch
    import re

    globs = [re.compile(fnmatch.translate(glob)) for glob in ("a.*", "b")]
    said = labels_of({**{f"a.{i:02}": "v" * 300 for i in range(40)}, "b": "x", "a.é": "y", "c": "z"})
    found = chosen(said, globs)
    assert [f"a.{i:02}" for i in range(16)] == [key for key, _ in found]
    assert {"v" * 255 + "…"} == {value for _, value in found}
    assert (("b", "x"),) == chosen((("b", "x"), ("bb", "y")), globs)


# ---- sockets


def listening(stack: ExitStack, path: Path) -> str:
    server = stack.enter_context(socket.socket(socket.AF_UNIX))
    path.parent.mkdir(parents=True, exist_ok=True)
    server.bind(str(path))
    server.listen()
    return str(path)


def test_sockets_are_found_when_they_are_there(tmp_path: Path) -> None:
    """Each usual socket is asked once, when it comes; containerd's speaks CRI as well; two names are one socket."""
    usual = {
        "docker": (str(tmp_path / "run/docker.sock"), str(tmp_path / "var/docker.sock")),
        "podman": (str(tmp_path / "podman.sock"),),
        "containerd": (str(tmp_path / "containerd.sock"),),
        "cri": (str(tmp_path / "crio.sock"),),
    }
    finder = SocketFinder(Runtimes(), usual)
    assert finder.wanted
    (tmp_path / "podman.sock").write_text("no socket")
    assert [] == finder.look()
    with ExitStack() as stack:
        listening(stack, tmp_path / "run/docker.sock")
        (tmp_path / "var").symlink_to("run")
        listening(stack, tmp_path / "containerd.sock")
        listening(stack, tmp_path / "crio.sock")
        found = {(r.api, Path(r.socket).name, tuple(sorted(r.serves)), r.watch_seconds) for r in finder.look()}
        assert {
            ("docker", "docker.sock", ("docker",), 30.0),
            ("containerd", "containerd.sock", ("containerd",), 30.0),
            ("cri", "containerd.sock", ("containerd",), 30.0),
            ("cri", "crio.sock", ("cri-o",), 1.0),
        } == found
        assert [] == finder.look()
        (tmp_path / "crio.sock").unlink()
        listening(stack, tmp_path / "crio.sock")
        assert [] == finder.look()


def test_configured_sockets_are_asked_whether_they_exist_or_not(tmp_path: Path) -> None:
    """A path is asked, so that its absence is seen; an empty one is not."""
    off = {"docker_socket": "", "podman_socket": "", "containerd_socket": "", "cri_socket": ""}
    assert not SocketFinder(Runtimes(**off)).wanted
    path = str(tmp_path / "s")
    for key, expected in (
        ("docker_socket", [("docker", {"docker"})]),
        ("podman_socket", [("docker", {"podman"})]),
        ("containerd_socket", [("containerd", {"containerd"})]),
        ("cri_socket", [("cri", {"cri-o", "containerd"})]),
    ):
        finder = SocketFinder(Runtimes(**{**off, key: path}))
        assert expected == [(r.api, set(r.serves)) for r in finder.look()]
        with ExitStack() as stack:
            listening(stack, tmp_path / "s")
            assert [] == finder.look()
        (tmp_path / "s").unlink()
