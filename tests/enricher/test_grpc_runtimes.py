"""containerd's and CRI's answers are believed where they are in form; sockets that lie, hang or flood cost little."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stella_enricher.runtimes.contact import Contact
from stella_enricher.runtimes.containerd import ContainerdApi
from stella_enricher.runtimes.cri import CriApi
from stella_enricher.runtimes.facts import Change, Facts, Listed, Pod
from stella_enricher.runtimes.protobuf import Message, field
from stella_enricher.runtimes.sockets import MAX_STREAM_BYTES_PER_SECOND
from tests.enricher.grpc_kit import Answer, Sender, serving

pytestmark = pytest.mark.anyio

ID = "a1" * 32
OTHER = "b2" * 32
POD_ID = "c3" * 32
DIGEST = "sha256:" + "d0" * 32
REPO = "registry.test/web@sha256:" + "e0" * 32


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# ---- protobuf


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    """Nothing but `ValueError` comes of bytes that are no message, or not the message that was meant."""
    try:
        message = Message(data)
        for read in (message.text, message.texts, message.number, message.message, message.messages, message.map):
            try:
                read(1)
            except ValueError:
                continue
    except ValueError:
        return


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=9)), st.text(max_size=300))
def test_what_was_written_is_read(labels: dict[str, str], text: str) -> None:
    """Strings, maps and messages come back; what is not there is empty."""
    data = field(1, text) + b"".join(field(200, field(1, key) + field(2, value)) for key, value in labels.items())
    message = Message(data)
    assert (text, labels, "", 0) == (message.text(1), message.map(200), message.text(2), message.number(3))
    assert [text] == message.texts(1)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",  # no length
        b"\x0a\x05abc",  # cut off
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a length without end
        b"\x0b",  # a group
        b"\x02\x00",  # field 0
        b"\x09\x00",  # half a fixed64
        b"\x08",  # no number
        b"\x0a\x00" * 70_000,  # too many fields
    ],
)
def test_broken_messages_are_refused(data: bytes) -> None:
    """Each way to be no message is an error."""
    with pytest.raises(ValueError, match=r"field|number|wire type"):
        Message(data)


# ---- answers


def containerd_container(container_id: str = ID, image: str = "web:1", label: str = "1") -> bytes:
    return field(1, field(1, container_id) + field(2, field(1, "a") + field(2, label)) + field(3, image))


def cri_container(container_id: str = ID, *more: bytes) -> bytes:
    said = [field(1, container_id), field(2, POD_ID), field(3, field(1, "web")), field(4, field(1, DIGEST))]
    return field(1, b"".join([*said, field(5, DIGEST), *more]))


IMAGE = field(1, field(1, DIGEST.removeprefix("sha256:")) + field(2, "web:1") + field(3, REPO) + field(3, "no"))
SANDBOX = field(1, field(1, POD_ID) + field(2, field(1, "web-0") + field(3, "team-a")))

ANSWERS = {
    "/containerd.services.namespaces.v1.Namespaces/List": field(1, field(1, "moby")) + field(1, field(1, "default")),
    "/containerd.services.containers.v1.Containers/Get": containerd_container(),
    "/containerd.services.images.v1.Images/Get": field(1, field(3, field(2, DIGEST))),
    "/containerd.services.tasks.v1.Tasks/List": field(1, field(2, ID)) + field(1, field(2, "free-name")),
    "/runtime.v1.RuntimeService/ListContainers": cri_container(),
    "/runtime.v1.RuntimeService/ListPodSandbox": SANDBOX,
    "/runtime.v1.ImageService/ImageStatus": IMAGE,
}


def saying(**changes: bytes | int) -> Answer:
    """Return what answers with `ANSWERS`, or for a method of that name with `changes`: a message or a status."""

    async def answer(method: str, _: bytes, sender: Sender) -> None:
        said = changes.get(method.rpartition("/")[2], ANSWERS.get(method, 12))
        await (sender.refuse(said) if isinstance(said, int) else sender.message(said))

    return answer


@asynccontextmanager
async def containerd(path: Path, **more: float) -> AsyncIterator[Contact]:
    contact = Contact(ContainerdApi(str(path), **more))  # type: ignore[arg-type]
    yield contact
    await contact.close()


@asynccontextmanager
async def cri(path: Path, **more: float) -> AsyncIterator[Contact]:
    contact = Contact(CriApi(str(path), **more))  # type: ignore[arg-type]
    yield contact
    await contact.close()


async def test_containerd_tells_image_digest_and_labels(tmp_path: Path) -> None:
    """The image's name leads to the digest of its manifest; Docker's namespace is passed over."""
    expected = Facts(digest=DIGEST, digest_kind="manifest", image="web:1", labels=(("a", "1"),), runtime="containerd")
    async with serving(tmp_path / "s", saying()) as called, containerd(tmp_path / "s") as contact:
        assert expected == await contact.facts_of(ID)
        assert expected == await contact.facts_of(ID)
        assert 1 == called.count("/containerd.services.namespaces.v1.Namespaces/List")
        assert [Listed(ID)] == await contact.containers()


async def test_cri_tells_image_tags_repository_digests_and_pod(tmp_path: Path) -> None:
    """An image that was asked for by digest has its tag's name; CRI-O's digests have no algorithm."""
    async with serving(tmp_path / "s", saying()), cri(tmp_path / "s") as contact:
        found = await contact.facts_of(ID)
        assert (DIGEST, "config", "web:1", (REPO,)) == (
            found.digest,
            found.digest_kind,
            found.image,
            found.repo_digests,
        )
        assert (Pod("team-a", "web-0", "web"), "web") == (found.pod, found.name)
        assert [Listed(ID)] == await contact.containers()


async def test_what_cannot_be_known_has_a_reason(tmp_path: Path) -> None:
    """No image, no container, a pod's own sandbox, an API that is switched off."""
    for number, (make, said, reason) in enumerate(
        (
            (containerd, saying(Get=5), "container_not_found"),
            (containerd, saying(Get=containerd_container(image="")), "no_image"),
            (containerd, saying(Get=13), "runtime_error"),
            (cri, saying(ListContainers=b"", ListPodSandbox=b""), "container_not_found"),
            (cri, saying(ListContainers=12), "container_not_found"),
            (cri, saying(ListContainers=2), "runtime_error"),
        )
    ):
        path = tmp_path / str(number)
        async with serving(path, said), make(path) as contact:
            assert reason == (await contact.facts_of(ID)).reason, number
    path = tmp_path / "sandbox"
    sandbox = field(1, field(1, ID) + field(2, field(1, "web-0") + field(3, "team-a")))
    async with serving(path, saying(ListContainers=b"", ListPodSandbox=sandbox)), cri(path) as contact:
        assert Facts(pod=Pod("team-a", "web-0"), reason="pod_sandbox") == await contact.facts_of(ID)
    path = tmp_path / "removed"
    async with serving(path, saying(ImageStatus=b"")), cri(path) as contact:
        assert DIGEST == (await contact.facts_of(ID)).digest
    async with serving(tmp_path / "off", saying(ListContainers=12)), cri(tmp_path / "off") as contact:
        await contact.facts_of(ID)
        assert ("not there", False) == (contact.status()["state"], contact.serves("containerd"))


LIES = {
    "another container": {"Get": containerd_container(OTHER), "ListContainers": cri_container(OTHER)},
    "no protobuf": {"Get": b"\xff\xff", "ListContainers": b"\xff\xff"},
    "no text": {"Get": field(1, field(1, b"\xff")), "ListContainers": field(1, field(1, b"\xff"))},
    "a number for a text": {"Get": field(1, b"\x08\x01"), "ListContainers": field(1, b"\x08\x01")},
    "an image without a digest": {
        "Get": containerd_container(image="a\nb"),
        "ListContainers": cri_container(ID, field(4, field(1, "a\nb"))),
    },
    "labels without end": {
        "Get": field(1, field(1, ID) + b"".join(field(2, field(1, str(i))) for i in range(300))),
        "ListContainers": cri_container(ID, *(field(8, field(1, str(i))) for i in range(300))),
    },
    "more than the bound": {"Get": field(1, b" " * (2 << 20)), "ListContainers": field(1, b" " * (2 << 20))},
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("make", [containerd, cri])
async def test_lies_are_nonsense(tmp_path: Path, make: object, lie: str) -> None:
    """An answer of the wrong form, size or content is refused whole, and the socket is left alone for a while."""
    path = tmp_path / "s"
    async with serving(path, saying(**LIES[lie])), make(path) as contact:  # type: ignore[operator]
        assert Facts(reason="runtime_nonsense") == await contact.facts_of(ID)
        assert ("waiting", "runtime_nonsense") == (contact.status()["state"], contact.status()["reason"])


RAW = {
    "no HTTP/2": b"HTTP/1.1 200 OK\r\n\r\n",
    "a frame without end": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "garbage": bytes(range(256)) * 64,
}


@pytest.mark.parametrize("raw", RAW)
async def test_bytes_that_are_no_grpc_are_an_error(tmp_path: Path, raw: str) -> None:
    """Garbage instead of frames ends the call at once or at its time-out."""

    async def answer(_: str, __: bytes, sender: Sender) -> None:
        await sender.raw(RAW[raw])

    async with serving(tmp_path / "s", answer), cri(tmp_path / "s", timeout_seconds=0.5) as contact:
        assert "runtime_" in (await contact.facts_of(ID)).reason
        assert not contact.well


@pytest.mark.parametrize("how", ["silence", "drip", "length"])
async def test_a_hanging_socket_costs_its_time_and_no_more(tmp_path: Path, how: str) -> None:
    """Silence, a byte at a time, and a message that claims more than comes all end at the time-out."""

    async def answer(_: str, __: bytes, sender: Sender) -> None:
        if how != "silence":
            await sender.headers()
        if how == "length":
            await sender.data(b"\0\0\0\xff\xff")
        while how == "drip":
            await sender.data(b"\0")
            await anyio.sleep(0.02)
        await anyio.sleep_forever()

    begun = time.monotonic()
    async with serving(tmp_path / "s", answer), containerd(tmp_path / "s", timeout_seconds=0.3) as contact:
        assert Facts(reason="runtime_timeout") == await contact.facts_of(ID)
        assert 1.5 > time.monotonic() - begun
        assert Facts(reason="runtime_timeout") == await contact.facts_of(ID)
        assert 1 == contact.calls


async def test_containerds_events_tell_of_containers(tmp_path: Path) -> None:
    """Envelopes come in pieces; topics and ids of another form are passed over."""

    def envelope(topic: str, container_id: str) -> bytes:
        event = field(1, "type") + field(2, field(1, container_id))
        message = field(2, "default") + field(3, topic) + field(4, event)
        return b"\0" + len(message).to_bytes(4, "big") + message

    stream = b"".join(
        [
            envelope("/containers/create", ID),
            envelope("/images/create", ID),
            envelope("/tasks/start", "free-name"),
            envelope("/containers/delete", ID),
        ]
    )

    async def answer(method: str, message: bytes, sender: Sender) -> None:
        if not method.endswith("Subscribe"):
            await saying()(method, message, sender)
            return
        await sender.headers()
        for at in range(0, len(stream), 11):
            await sender.data(stream[at : at + 11])
        await anyio.sleep_forever()

    changes: list[Change] = []
    path = tmp_path / "s"
    async with serving(path, answer), containerd(path) as contact, anyio.create_task_group() as tasks:
        tasks.start_soon(contact.watch, changes.append, lambda *_: None)
        with anyio.fail_after(5):
            while len(changes) < 2 or not contact.listed:
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert [Change("here", ID), Change("gone", ID)] == changes


async def test_a_flood_of_events_leaves_time_for_others(tmp_path: Path) -> None:
    """A stream that never rests is read no faster than its bound, and the loop goes on."""
    event = field(2, "default") + field(3, "/containers/create") + field(4, field(2, field(1, ID)))
    piece = (b"\0" + len(event).to_bytes(4, "big") + event) * 100
    sent = 0

    async def answer(method: str, message: bytes, sender: Sender) -> None:
        nonlocal sent
        if not method.endswith("Subscribe"):
            await saying()(method, message, sender)
            return
        await sender.headers()
        while True:
            await sender.data(piece)
            sent += len(piece)

    turns, begun, path = 0, time.monotonic(), tmp_path / "s"
    async with serving(path, answer), containerd(path) as contact, anyio.create_task_group() as tasks:
        tasks.start_soon(contact.watch, lambda _: None, lambda *_: None)
        while time.monotonic() < begun + 2.0:
            await anyio.sleep(0.01)
            turns += 1
        seconds = time.monotonic() - begun
        tasks.cancel_scope.cancel()
    assert 20 < turns
    # What is under way in buffers comes on top of the first second's share.
    assert (seconds + 2) * MAX_STREAM_BYTES_PER_SECOND > sent > MAX_STREAM_BYTES_PER_SECOND / 4
