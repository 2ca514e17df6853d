"""HTTP to services outside: bounded in time and size, and every failure sorted into what to do about it.

Later      try the same again: no connection, time-out, 408, 425, 429, 5xx
Frozen     this log takes nothing any more (405): look for the next one
Refused    this request is never taken (other 4xx)
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from stella_shared.http_library import httpx

MAX_BYTES: Final = 4 << 20
CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 40.0
_RETRY: Final = frozenset({408, 425, 429})
_MAX_RETRY_AFTER_SECONDS: Final = 3600.0


class Later(Exception):
    """A passing failure.  `after_seconds` is what the service asked for, 0 for nothing."""

    def __init__(self, reason: str, after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class Frozen(Exception):
    """The log is closed for good."""


class Refused(Exception):
    """The service will never take this."""


class Answer(msgspec.Struct, frozen=True):
    """A reply of at most `MAX_BYTES`: 2xx, or 409."""

    status: int
    headers: dict[str, str]
    body: bytes


class Outside:
    """An HTTP client.  Use as an async context manager."""

    def __init__(self) -> None:
        timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=30.0)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)

    async def __aenter__(self) -> Outside:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def get(self, url: str) -> Answer:
        """Return the reply to a GET."""
        return await self._ask("GET", url, b"", {})

    async def post(self, url: str, body: bytes, kind: str, **headers: str) -> Answer:
        """Return the reply to a POST of `body`, a `kind` such as application/json."""
        return await self._ask("POST", url, body, {"Content-Type": kind, **headers})

    async def _ask(self, method: str, url: str, body: bytes, headers: dict[str, str]) -> Answer:
        try:
            async with self._client.stream(method, url, content=body or None, headers=headers) as reply:
                data = b""
                async for part in reply.aiter_bytes():
                    data += part
                    if len(data) > MAX_BYTES:
                        raise Refused(f"{url}: a reply of more than {MAX_BYTES} bytes")
                return _sorted(url, reply.status_code, {k.lower(): v for k, v in reply.headers.items()}, data)
        except httpx.InvalidURL as e:
            raise Refused(f"{url}: {e}") from None
        except httpx.HTTPError as e:
            raise Later(_reason(e)) from None


def _sorted(url: str, status: int, headers: dict[str, str], body: bytes) -> Answer:
    if 200 <= status < 300 or status == 409:
        return Answer(status, headers, body)
    said = body[:200].decode("utf-8", "replace").strip().replace("\n", " ")
    reason = f"HTTP {status} {said}".strip()
    if status == 405:
        raise Frozen(f"{url}: {reason}")
    if status >= 500 or status in _RETRY:
        raise Later(reason, _retry_after(headers.get("retry-after", "")))
    raise Refused(reason)


def _retry_after(text: str) -> float:
    """Return the seconds of a Retry-After header; a date, which services rarely send, counts as nothing."""
    return min(float(text), _MAX_RETRY_AFTER_SECONDS) if text.isascii() and text.isdigit() else 0.0


def _reason(error: httpx.HTTPError) -> str:
    """Return a transport failure in the words of the operating system, where it has some."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return str(error) or "no connection"
    if isinstance(error, httpx.TimeoutException):
        return "time-out"
    return str(error) or type(error).__name__
