"""The Docker Engine API: Docker, and podman, whose compatible socket answers the same.

GET /containers/<id>/json      .Id .Name .Image .Config.Image .Config.Labels
GET /images/<.Image>/json      .RepoDigests
GET /containers/json?all=true  .Id .State
GET /events                    .Action .Actor.ID
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Final, Literal
from urllib.parse import quote

import msgspec

from stella_enricher.runtimes.facts import (
    CONTAINER_ID,
    Change,
    Facts,
    Listed,
    Refusal,
    digest_text,
    is_digest,
    labels_of,
    name_text,
    repo_digests_of,
)
from stella_enricher.runtimes.sockets import CALL_TIMEOUT_SECONDS, MAX_ANSWER_BYTES, MAX_LIST_BYTES, HttpSocket

#: podman says `remove` and `died` where Docker says `destroy` and `die`.
_KINDS: Final[dict[str, Literal["here", "altered", "gone"]]] = {
    "create": "here",
    "start": "here",
    "rename": "altered",
    "destroy": "gone",
    "remove": "gone",
}
_EVENTS: Final = "/events?filters=" + quote('{"type":["container"],"event":["create","start","rename","destroy"]}')
_PODMAN_EVENTS: Final = "/events?filters=" + quote('{"type":["container"]}')


class _ContainerAnswer(msgspec.Struct):
    id: str = msgspec.field(name="Id")
    image_id: str = msgspec.field(name="ImageID", default="")
    image: str = msgspec.field(name="Image", default="")
    names: list[str] | None = msgspec.field(name="Names", default=None)
    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)
    state: str = msgspec.field(name="State", default="")


class _ImageAnswer(msgspec.Struct):
    repo_digests: list[str] | None = msgspec.field(name="RepoDigests", default=None)


class _Actor(msgspec.Struct):
    id: str = msgspec.field(name="ID", default="")


class _EventAnswer(msgspec.Struct):
    action: str = msgspec.field(name="Action", default="")
    actor: _Actor | None = msgspec.field(name="Actor", default=None)


_list_decoder = msgspec.json.Decoder(list[_ContainerAnswer])
_image_decoder = msgspec.json.Decoder(_ImageAnswer)
_event_decoder = msgspec.json.Decoder(_EventAnswer)


class DockerApi:
    """A `Runtime` by Docker's API; `runtime` is docker or podman."""

    api: str = "docker"
    streams: bool = True
    watch_seconds: float = 30.0

    def __init__(self, socket: str, *, runtime: str = "docker", timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        self.socket = socket
        self.serves = frozenset({runtime})
        self._runtime = runtime
        self._http = HttpSocket(socket, timeout_seconds=timeout_seconds)

    async def facts_of(self, container_id: str) -> Facts:
        """Return what is known of the container.  Takes two calls."""
        found = await self._list(quote(f'{{"id":["{container_id}"]}}'), MAX_ANSWER_BYTES)
        if not found:
            raise Refusal("container_not_found")
        said = found[0]
        if said.id != container_id:
            raise Refusal("runtime_nonsense")
        name = name_text(said.image)
        facts = Facts(
            digest=_with_algorithm(said.image_id),
            # Where its tag has gone to another image, the engine gives the id for the name.
            image="" if is_digest(name) else name,
            labels=labels_of(said.labels),
            name=name_text(next(iter(said.names or []), "").removeprefix("/")),
            runtime=self._runtime,
        )
        repo_digests = await self._repo_digests(facts.digest)
        # In the containerd image store the engine's image id is one of the repository digests; a config
        # digest never is.
        is_manifest = any(repo_digest.endswith("@" + facts.digest) for repo_digest in repo_digests)
        return msgspec.structs.replace(
            facts, digest_kind="manifest" if is_manifest else "config", repo_digests=repo_digests
        )

    async def containers(self) -> list[Listed]:
        """Return all containers, stopped ones too."""
        said = await self._list("", MAX_LIST_BYTES)
        return [Listed(c.id, c.state not in ("exited", "dead")) for c in said if CONTAINER_ID.fullmatch(c.id)]

    async def changes(self) -> AsyncGenerator[Change, None]:
        """Yield creations, starts, renames and removals."""
        path = _EVENTS if self._runtime == "docker" else _PODMAN_EVENTS
        async with contextlib.aclosing(self._http.lines(path)) as lines:
            async for line in lines:
                if not line.strip():
                    continue
                with _decoding():
                    event = _event_decoder.decode(line)
                kind = _KINDS.get(event.action)
                if kind and event.actor is not None and CONTAINER_ID.fullmatch(event.actor.id):
                    yield Change(kind, event.actor.id)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close()

    async def _list(self, filters: str, max_bytes: int) -> list[_ContainerAnswer]:
        more = f"&filters={filters}" if filters else ""
        with _decoding():
            return _list_decoder.decode(await self._http.get(f"/containers/json?all=true{more}", max_bytes))

    async def _repo_digests(self, digest: str) -> tuple[str, ...]:
        try:
            with _decoding():
                answer = _image_decoder.decode(await self._http.get(f"/images/{digest}/json"))
        except Refusal as refusal:
            # The image was removed under its container (`docker rmi -f`): the container's word stands.
            if refusal.reason == "container_not_found":
                return ()
            raise
        return repo_digests_of(answer.repo_digests or [])


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise Refusal("runtime_nonsense") from None


def _with_algorithm(digest: str) -> str:
    # podman of some versions leaves it out.
    return digest_text(digest if digest.startswith("sha256:") else f"sha256:{digest}")
