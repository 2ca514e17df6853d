"""Which image a container runs, from the Docker Engine API.  The only module that speaks to its socket.

    GET /containers/<id>/json   .Id .Image .Config.Image
    GET /images/<.Image>/json   .RepoDigests

podman's Docker-compatible socket answers the same.  Every call is bounded in time and size, and what
comes back is believed only where it has the right form: the socket may hang, lie or be absent, and then
the answer is a value with a reason.  After a failure the socket is left alone for a while.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import anyio
import httpx
import msgspec

CALL_TIMEOUT_SECONDS: Final = 2.0
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_NAME_LENGTH: Final = 512
MAX_REPO_DIGESTS: Final = 8
FIRST_BACKOFF_SECONDS: Final = 1.0
LAST_BACKOFF_SECONDS: Final = 30.0

_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REPO_DIGEST = re.compile(r"[!-~]{1,255}@(sha256:[0-9a-f]{64})")

#: Reasons that say the socket itself is not well; they start the backoff.
_SOCKET_REASONS: Final = frozenset(
    {"no_runtime_socket", "runtime_denied", "runtime_timeout", "runtime_error", "runtime_nonsense"}
)


class Image(msgspec.Struct, frozen=True):
    """What the runtime says about a container's image, or `reason` why it says nothing.

    `digest_kind` is `config` for the classic image store and `manifest` for the containerd image store,
    where the engine's image id is the digest of a manifest or an index.  `repo_digests` are
    `name@sha256:…`, the names under which a registry knows the image; a local build has none.
    """

    digest: str = ""
    digest_kind: str = ""
    name: str = ""
    repo_digests: tuple[str, ...] = ()
    reason: str = ""


class _Config(msgspec.Struct):
    image: str = msgspec.field(name="Image", default="")


class _ContainerAnswer(msgspec.Struct):
    id: str = msgspec.field(name="Id")
    image: str = msgspec.field(name="Image")
    config: _Config | None = msgspec.field(name="Config", default=None)


class _ImageAnswer(msgspec.Struct):
    repo_digests: list[str] | None = msgspec.field(name="RepoDigests", default=None)


_container_decoder = msgspec.json.Decoder(_ContainerAnswer)
_image_decoder = msgspec.json.Decoder(_ImageAnswer)


class _Refusal(Exception):
    """Carries a reason from the seam to `image_of`; never leaves this module."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DockerApi:
    """A client for one Docker socket.  Use as `async with DockerApi(path) as docker:`."""

    def __init__(
        self,
        socket_path: str,
        *,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.socket_path = socket_path
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._failures_in_a_row = 0
        self._not_before = 0.0
        self._last_reason = ""
        self._calls = 0
        self._failures: dict[str, int] = {}
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=socket_path, limits=httpx.Limits(max_connections=8, max_keepalive_connections=2)
            ),
            base_url="http://docker",
            # A compressed answer could unfold beyond any bound.
            headers={"Accept-Encoding": "identity"},
            timeout=timeout_seconds,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    @property
    def well(self) -> bool:
        """False while the socket is left alone after a failure."""
        return self._clock() >= self._not_before

    @property
    def retry_seconds(self) -> float:
        """How long the socket is still left alone."""
        return max(0.0, self._not_before - self._clock())

    async def image_of(self, container_id: str) -> Image:
        """Return the image of the container with this id (64 hex).  Never raises; takes two calls at the most.

        Reasons: `no_runtime_socket`, `runtime_denied` (the socket's permissions), `runtime_timeout`,
        `runtime_error` (an HTTP error), `runtime_nonsense` (too big, not JSON, not what was asked for),
        `container_not_found` (this runtime does not know it), `not_a_container_id`.  During the backoff
        the reason is that of the last failure.
        """
        if not _CONTAINER_ID.fullmatch(container_id):
            return Image(reason="not_a_container_id")
        if not self.well:
            return Image(reason=self._last_reason)
        try:
            image = await self._image_of(container_id)
        except _Refusal as refusal:
            self._failures[refusal.reason] = self._failures.get(refusal.reason, 0) + 1
            if refusal.reason in _SOCKET_REASONS:
                self._back_off(refusal.reason)
            return Image(reason=refusal.reason)
        self._failures_in_a_row = 0
        return image

    def stats(self) -> dict[str, int]:
        """Return `api_calls`, and `api_failures{reason=…}` for each reason seen."""
        counts = {f"api_failures{{reason={reason}}}": n for reason, n in self._failures.items()}
        return {"api_calls": self._calls, **counts}

    async def _image_of(self, container_id: str) -> Image:
        try:
            container = _container_decoder.decode(await self._get(f"/containers/{container_id}/json"))
        except msgspec.MsgspecError:
            raise _Refusal("runtime_nonsense") from None
        name = container.config.image if container.config is not None else ""
        if container.id != container_id or not _DIGEST.fullmatch(container.image):
            raise _Refusal("runtime_nonsense")
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise _Refusal("runtime_nonsense")
        repo_digests = await self._repo_digests(container.image)
        # In the containerd image store the engine's image id is one of the repository digests; a config
        # digest never is.
        is_manifest = any(repo_digest.endswith("@" + container.image) for repo_digest in repo_digests)
        return Image(container.image, "manifest" if is_manifest else "config", name, repo_digests)

    async def _repo_digests(self, digest: str) -> tuple[str, ...]:
        try:
            answer = _image_decoder.decode(await self._get(f"/images/{digest}/json"))
        except msgspec.MsgspecError:
            raise _Refusal("runtime_nonsense") from None
        except _Refusal as refusal:
            # The image was removed under its container (`docker rmi -f`): the container's word stands.
            if refusal.reason == "container_not_found":
                return ()
            raise
        listed = answer.repo_digests or []
        return tuple(sorted(d for d in listed if _REPO_DIGEST.fullmatch(d))[:MAX_REPO_DIGESTS])

    async def _get(self, path: str) -> bytes:
        self._calls += 1
        try:
            with anyio.fail_after(self._timeout_seconds):
                return await self._read(path)
        except (TimeoutError, httpx.TimeoutException):
            raise _Refusal("runtime_timeout") from None
        except httpx.ConnectError as e:
            raise _Refusal("runtime_denied" if _was_denied(e) else "no_runtime_socket") from None
        except httpx.ReadError:
            raise _Refusal("runtime_error") from None
        except (httpx.HTTPError, ValueError):
            raise _Refusal("runtime_nonsense") from None

    async def _read(self, path: str) -> bytes:
        async with self._client.stream("GET", path) as answer:
            if answer.status_code == httpx.codes.NOT_FOUND:
                raise _Refusal("container_not_found")
            if answer.status_code != httpx.codes.OK:
                raise _Refusal("runtime_error")
            body = bytearray()
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise _Refusal("runtime_nonsense")
            return bytes(body)

    def _back_off(self, reason: str) -> None:
        if not self.well:
            return  # A call that ran beside this one failed too: that is one failure, not two.
        wait = min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**self._failures_in_a_row)
        self._failures_in_a_row = min(self._failures_in_a_row + 1, 16)
        self._last_reason = reason
        self._not_before = self._clock() + wait


def _was_denied(error: BaseException) -> bool:
    """Say whether a PermissionError lies at the bottom of `error`."""
    below = error.__cause__ or error.__context__
    return isinstance(error, PermissionError) or (below is not None and _was_denied(below))
