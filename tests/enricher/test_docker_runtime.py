"""The Docker socket is believed where it answers in form, and otherwise gives a reason, in time."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.abc
import msgspec
import pytest

from stella_enricher.runtimes.contact import Contact
from stella_enricher.runtimes.docker import DockerApi
from stella_enricher.runtimes.facts import Change, Facts, Listed

pytestmark = pytest.mark.anyio

ID = "a1" * 32
CONFIG = "sha256:" + "c0" * 32
MANIFEST = "sha256:" + "d0" * 32

ASKED = "/containers/json?all=true&filters=" + quote(f'{{"id":["{ID}"]}}')
FOUND = Facts(digest=CONFIG, digest_kind="config", image="web:1", name="web", runtime="docker")

Answer = Callable[[str, anyio.abc.SocketStream], Awaitable[None]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def container(**changes: object) -> bytes:
    said = {"Id": ID, "ImageID": CONFIG, "Names": ["/web"], "Image": "web:1", "State": "created", "Labels": None}
    return http("200 OK", json.dumps([said | changes]).encode())


def image(digest: str = CONFIG, repo_digests: object = ()) -> bytes:
    return http("200 OK", json.dumps({"Id": digest, "RepoDigests": repo_digests}).encode())


@asynccontextmanager
async def engine(path: Path, answer: Answer) -> AsyncIterator[list[str]]:
    """Serve HTTP on a UNIX socket: `answer` gets each request's path and the stream.  Yields the paths asked."""
    asked: list[str] = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            seen = b""
            try:
                while True:
                    while b"\r\n\r\n" not in seen:
                        seen += await stream.receive()
                    request, _, seen = seen.partition(b"\r\n\r\n")
                    asked.append(request.split(b" ")[1].decode())
                    await answer(asked[-1], stream)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                pass

    listener = await anyio.create_unix_listener(path)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        yield asked
        # Let the streams see their clients' end first: anyio's UNIX streams do not like both at once.
        await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def asking(
    path: Path, *, timeout_seconds: float = 2.0, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Contact]:
    """Give a contact that asks the socket at `path` as Docker's."""
    contact = Contact(DockerApi(str(path), timeout_seconds=timeout_seconds), clock=clock)
    yield contact
    await contact.close()


def saying(containers: bytes, images: bytes = b"") -> Answer:
    async def answer(path: str, stream: anyio.abc.SocketStream) -> None:
        await stream.send(containers if path.startswith("/containers/") else images)

    return answer


async def test_a_containers_image_is_told_with_its_kind(tmp_path: Path) -> None:
    """The config digest, the image's name and its repository digests come in two calls."""
    path = tmp_path / "s"
    repo_digest = f"registry.test/web@{MANIFEST}"
    async with engine(path, saying(container(), image(repo_digests=[repo_digest]))) as asked:
        async with asking(path) as docker:
            assert msgspec.structs.replace(FOUND, repo_digests=(repo_digest,)) == await docker.facts_of(ID)
            assert (1, {}, "ok") == (docker.calls, docker.failures, docker.status()["state"])
        assert [ASKED, f"/images/{CONFIG}/json"] == asked


async def test_the_containerd_image_store_gives_a_manifest_digest(tmp_path: Path) -> None:
    """Where the image id is itself a repository digest, it is said to be a manifest's."""
    path = tmp_path / "s"
    said = saying(container(ImageID=MANIFEST), image(MANIFEST, [f"web@{MANIFEST}"]))
    async with engine(path, said), asking(path) as docker:
        found = await docker.facts_of(ID)
        assert (MANIFEST, "manifest") == (found.digest, found.digest_kind)


async def test_a_tag_that_has_moved_on_gives_no_name(tmp_path: Path) -> None:
    """The engine then gives the image's id for its name; the digest stands."""
    async with engine(tmp_path / "s", saying(container(Image=CONFIG), image())), asking(tmp_path / "s") as docker:
        assert msgspec.structs.replace(FOUND, image="") == await docker.facts_of(ID)


async def test_an_image_removed_under_its_container_still_has_its_digest(tmp_path: Path) -> None:
    """404 for the image leaves the container's word standing, without repository digests."""
    path = tmp_path / "s"
    async with (
        engine(path, saying(container(), http("404 Not Found", b"{}"))),
        asking(path) as docker,
    ):
        assert FOUND == await docker.facts_of(ID)


LIES = {
    "another container": container(Id="b2" * 32),
    "no digest": container(ImageID="web:1"),
    "a digest that leads elsewhere": container(ImageID="sha256:../../containers/x"),
    "a newline in the name": container(Image="web\n1"),
    "labels without end": container(Labels={f"a{i}": "" for i in range(300)}),
    "a label's key without end": container(Labels={"a" * 300: ""}),
    "labels that are no texts": container(Labels={"a": 1}),
    "an endless name": container(Image="w" * 513),
    "wrong types": container(ImageID=7),
    "no list": http("200 OK", b"{}"),
    "a list of nothing": http("200 OK", b"[null]"),
    "no JSON": http("200 OK", b"\xff\xfe{"),
    "no HTTP": b"\x00\x01\x02 what\r\n\r\n",
    "an endless header": b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * 300_000 + b"\r\n\r\n",
    "more than the bound": http("200 OK", b" " * ((1 << 20) + 1)),
    "deep nesting": http("200 OK", b"[" * 100_000),
}


@pytest.mark.parametrize("lie", LIES)
async def test_nonsense_is_called_so(tmp_path: Path, lie: str) -> None:
    """An answer of the wrong form, size or content is refused whole."""
    path = tmp_path / "s"
    async with engine(path, saying(LIES[lie])), asking(path) as docker:
        assert Facts(reason="runtime_nonsense") == await docker.facts_of(ID)


async def test_repository_digests_are_taken_in_form_only(tmp_path: Path) -> None:
    """Entries that are no repository digests are left out, and no more than 8 are kept."""
    path = tmp_path / "s"
    listed = ["<none>@<none>", "a b@" + MANIFEST] + [f"r{i:02}@{MANIFEST}" for i in range(40)]
    said = saying(container(), image(repo_digests=listed))
    async with engine(path, said), asking(path) as docker:
        found = await docker.facts_of(ID)
        assert tuple(f"r{i:02}@{MANIFEST}" for i in range(8)) == found.repo_digests


async def test_an_endless_answer_is_cut_off(tmp_path: Path) -> None:
    """A body without end is given up at the bound, long before the time is over."""
    path = tmp_path / "s"

    async def pour(_: str, stream: anyio.abc.SocketStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send(b" " * 65536)

    async with engine(path, pour), asking(path) as docker:
        assert Facts(reason="runtime_nonsense") == await docker.facts_of(ID)


@pytest.mark.parametrize("drip", [False, True])
async def test_a_hanging_socket_costs_its_time_and_no_more(tmp_path: Path, drip: bool) -> None:
    """Silence, and an answer a byte at a time, both end at the time-out."""
    path = tmp_path / "s"

    async def hang(_: str, stream: anyio.abc.SocketStream) -> None:
        while drip:
            await stream.send(b"H")
            await anyio.sleep(0.01)
        await anyio.sleep_forever()

    begun = time.monotonic()
    async with engine(path, hang), asking(path, timeout_seconds=0.2) as docker:
        assert "runtime_timeout" == (await docker.facts_of(ID)).reason or drip
        assert 1.0 > time.monotonic() - begun
        assert not docker.well


async def test_errors_have_reasons(tmp_path: Path) -> None:
    """500, no such container, an absent and a forbidden socket are told apart."""
    path = tmp_path / "s"
    for said, reason in (
        (http("500 Internal Server Error", b"{}"), "runtime_error"),
        (http("302 Found", b""), "runtime_error"),
        (http("200 OK", b"[]"), "container_not_found"),
    ):
        async with engine(path, saying(said)), asking(path) as docker:
            assert Facts(reason=reason) == await docker.facts_of(ID)
            assert {reason: 1} == docker.failures
        path.unlink()
    async with asking(path) as docker:
        assert Facts(reason="no_runtime_socket") == await docker.facts_of(ID)
    path.write_text("not a socket")
    async with asking(path) as docker:
        assert Facts(reason="no_runtime_socket") == await docker.facts_of(ID)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become nobody for one call")
async def test_a_forbidden_socket_says_denied(tmp_path: Path) -> None:
    """A socket that our user may not open is told from one that is not there."""
    path = Path("/tmp", f"stella-test-{os.getpid()}.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o600)
        os.seteuid(65534)
        try:
            async with asking(path) as docker:
                assert Facts(reason="runtime_denied") == await docker.facts_of(ID)
        finally:
            os.seteuid(0)
            path.unlink()


async def test_no_path_can_be_asked_for(tmp_path: Path) -> None:
    """What is not a container id never reaches the socket."""
    path = tmp_path / "s"
    async with engine(path, saying(container())) as asked, asking(path) as docker:
        assert Facts(reason="not_a_container_id") == await docker.facts_of("../images/json")
        assert [] == asked


async def test_a_sick_socket_is_left_alone_for_a_while(tmp_path: Path) -> None:
    """After a failure nothing is asked for 1 s, then 2 s, up to 30 s; one success makes it well."""
    path = tmp_path / "s"
    now = [100.0]
    sick = True

    async def answer(asked: str, stream: anyio.abc.SocketStream) -> None:
        await (saying(http("500 no", b"")) if sick else saying(container(), image()))(asked, stream)

    async with engine(path, answer) as asked, asking(path, clock=lambda: now[0]) as docker:
        for wait in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
            before = len(asked)
            assert "runtime_error" == (await docker.facts_of(ID)).reason
            assert "runtime_error" == (await docker.facts_of(ID)).reason
            assert before + 1 == len(asked)
            assert wait == docker.retry_seconds
            now[0] += wait
        sick = False
        assert CONFIG == (await docker.facts_of(ID)).digest
        assert docker.well


EVENTS = [
    {"Type": "container", "Action": "create", "Actor": {"ID": ID, "Attributes": {"image": "web:1"}}},
    {"Type": "container", "Action": "exec_start: sh", "Actor": {"ID": ID}},
    {"Type": "container", "Action": "start", "Actor": {"ID": "../x"}},
    {"Type": "container", "Action": "rename", "Actor": {"ID": ID}},
    {"Type": "container", "Action": "destroy", "Actor": {"ID": ID}},
]


async def test_events_tell_of_containers_as_they_come_and_go(tmp_path: Path) -> None:
    """Creation, rename and removal are told, in pieces of any size; what is no container is passed over."""
    path = tmp_path / "s"
    data = b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS)

    async def pour(asked: str, stream: anyio.abc.SocketStream) -> None:
        if asked.startswith("/containers/json"):
            await stream.send(http("200 OK", json.dumps([{"Id": ID, "State": "exited"}, {"Id": "x"}]).encode()))
            return
        await stream.send(b"HTTP/1.1 200 OK\r\n\r\n")
        for at in range(0, len(data), 7):
            await stream.send(data[at : at + 7])
        await anyio.sleep_forever()

    changes: list[Change] = []
    lists: list[list[Listed]] = []
    async with engine(path, pour), asking(path) as docker, anyio.create_task_group() as tasks:
        tasks.start_soon(docker.watch, changes.append, lambda listed, _: lists.append(listed))
        with anyio.fail_after(5):
            while len(changes) < 3 or not lists:
                await anyio.sleep(0.01)
        assert docker.status()["streaming"]
        assert docker.listed
        tasks.cancel_scope.cancel()
    assert [Change("here", ID), Change("altered", ID), Change("gone", ID)] == changes
    assert [[Listed(ID, running=False)]] == lists


@pytest.mark.parametrize("poison", [b"a" * (1 << 19), b"{]\n", b"\xff\n", b"[" * 100_000 + b"\n"])
async def test_a_stream_of_nonsense_is_left_and_taken_up_again(tmp_path: Path, poison: bytes) -> None:
    """An event without end or form ends the stream; it is asked for again a second later."""
    path = tmp_path / "s"

    async def pour(asked: str, stream: anyio.abc.SocketStream) -> None:
        if asked.startswith("/containers/json"):
            await stream.send(http("200 OK", b"[]"))
            return
        await stream.send(b"HTTP/1.1 200 OK\r\n\r\n" + poison)
        await anyio.sleep_forever()

    async with engine(path, pour) as asked, asking(path) as docker, anyio.create_task_group() as tasks:
        tasks.start_soon(docker.watch, lambda _: None, lambda *_: None)
        with anyio.fail_after(5):
            while sum(a.startswith("/events") for a in asked) < 2:
                await anyio.sleep(0.05)
        assert docker.failures["runtime_nonsense"] >= 1
        assert docker.well
        tasks.cancel_scope.cancel()
