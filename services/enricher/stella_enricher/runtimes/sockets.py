"""One UNIX socket of a runtime, spoken to in HTTP/1.1 or in gRPC.  The only module that opens one.

A call is bounded in time and in the bytes of its answer; a stream in the bytes of each event and in bytes
a second.  Whatever goes wrong below becomes a `Refusal` with a reason.

gRPC is HTTP/2 with five bytes before each message.  An error that comes without a message, as all of the
runtimes' do, has its status in the headers; what stands in trailers behind a message is not seen.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import AsyncGenerator, Iterator
from typing import Final

import anyio

from stella_enricher.runtimes.facts import Refusal
from stella_shared.http_library import httpx

CALL_TIMEOUT_SECONDS: Final = 2.0
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_LIST_BYTES: Final = 8 << 20
MAX_EVENT_BYTES: Final = 1 << 18
#: What a stream may send; beyond it its sender waits.
MAX_STREAM_BYTES_PER_SECOND: Final = 4 << 20
_GRPC_NOT_FOUND, _GRPC_UNIMPLEMENTED = "5", "12"


class HttpSocket:
    """HTTP/1.1 on a UNIX socket."""

    def __init__(self, path: str, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS, http2: bool = False) -> None:
        self.path = path
        self._timeout_seconds = timeout_seconds
        self._client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=path,
                http1=not http2,
                http2=http2,
                limits=httpx.Limits(max_connections=8, max_keepalive_connections=2),
            ),
            base_url="http://localhost",
            # A compressed answer could unfold beyond any bound.
            headers={"Accept-Encoding": "identity"},
            timeout=timeout_seconds,
            trust_env=False,
        )

    async def get(self, path: str, max_bytes: int = MAX_ANSWER_BYTES) -> bytes:
        """Return the body of `path`.  Raises `Refusal`: `container_not_found` for 404."""
        return await self._body("GET", path, {}, b"", max_bytes)

    async def lines(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a body that goes on for ever."""
        rest = b""
        async with contextlib.aclosing(self._pieces("GET", path, {}, b"")) as pieces:
            async for piece in pieces:
                *whole, rest = (rest + piece).split(b"\n")
                if len(rest) > MAX_EVENT_BYTES:
                    raise Refusal("runtime_nonsense")
                for line in whole:
                    yield line

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _body(self, verb: str, path: str, headers: dict[str, str], content: bytes, max_bytes: int) -> bytes:
        body = bytearray()
        with _translated(), anyio.fail_after(self._timeout_seconds):
            async with self._client.stream(verb, path, headers=headers, content=content or None) as answer:
                _check(answer)
                async for piece in answer.aiter_raw():
                    body += piece
                    if len(body) > max_bytes:
                        raise Refusal("runtime_nonsense")
        return bytes(body)

    async def _pieces(
        self, verb: str, path: str, headers: dict[str, str], content: bytes
    ) -> AsyncGenerator[bytes, None]:
        # Silence is what a stream is made of: only connecting has a time limit.
        timeout = httpx.Timeout(self._timeout_seconds, read=None)
        count, second = 0, anyio.current_time()
        with _translated():
            async with self._client.stream(
                verb, path, headers=headers, content=content or None, timeout=timeout
            ) as answer:
                _check(answer)
                async for piece in answer.aiter_raw():
                    yield piece
                    count += len(piece)
                    if count >= MAX_STREAM_BYTES_PER_SECOND:
                        await anyio.sleep_until(second + 1.0)
                        count, second = 0, anyio.current_time()


class GrpcSocket(HttpSocket):
    """gRPC on a UNIX socket: messages are bytes.  Streams have a connection of their own."""

    def __init__(self, path: str, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS) -> None:
        super().__init__(path, timeout_seconds=timeout_seconds, http2=True)

    async def call(
        self, method: str, message: bytes = b"", *, namespace: str = "", max_bytes: int = MAX_ANSWER_BYTES
    ) -> bytes:
        """Return the answer of `/package.Service/Method`.

        Raises `Refusal`: `container_not_found` for NOT_FOUND, `unimplemented` where the method is not there.
        """
        body = await self._body("POST", method, _headers(namespace), _framed(message), max_bytes + 5)
        if len(body) < 5 or body[0] or len(body) != 5 + int.from_bytes(body[1:5], "big"):
            raise Refusal("runtime_nonsense")
        return body[5:]

    async def stream(self, method: str, message: bytes = b"") -> AsyncGenerator[bytes, None]:
        """Yield the messages of a method that streams."""
        rest = b""
        async with contextlib.aclosing(self._pieces("POST", method, _headers(""), _framed(message))) as pieces:
            async for piece in pieces:
                rest += piece
                at = 0
                while len(rest) - at >= 5 and len(rest) >= (
                    end := at + 5 + int.from_bytes(rest[at + 1 : at + 5], "big")
                ):
                    yield rest[at + 5 : end]
                    at = end
                rest = rest[at:]
                if len(rest) > MAX_EVENT_BYTES or rest[:1] not in (b"", b"\0"):
                    raise Refusal("runtime_nonsense")


def _headers(namespace: str) -> dict[str, str]:
    headers = {"Content-Type": "application/grpc", "TE": "trailers"}
    return headers | {"containerd-namespace": namespace} if namespace else headers


def _framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def _check(answer: httpx.Response) -> None:
    status = answer.headers.get("grpc-status", "0")
    if answer.status_code == httpx.codes.NOT_FOUND or status == _GRPC_NOT_FOUND:
        raise Refusal("container_not_found")
    if status == _GRPC_UNIMPLEMENTED:
        raise Refusal("unimplemented")
    if answer.status_code != httpx.codes.OK or status != "0":
        raise Refusal("runtime_error")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except Refusal:
        raise
    except (TimeoutError, httpx.TimeoutException):
        raise Refusal("runtime_timeout") from None
    except httpx.ConnectError as e:
        raise Refusal("runtime_denied" if _was_denied(e) else "no_runtime_socket") from None
    except httpx.ReadError:
        raise Refusal("runtime_error") from None
    except Exception:  # whatever two libraries make of bytes that are no HTTP
        raise Refusal("runtime_nonsense") from None


def _was_denied(error: BaseException) -> bool:
    """Say whether a PermissionError lies at the bottom of `error`."""
    below = error.__cause__ or error.__context__
    return isinstance(error, PermissionError) or (below is not None and _was_denied(below))


def identity(path: str) -> tuple[int, int] | None:
    """Return what tells one socket from another, None when there is none at `path`."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None
