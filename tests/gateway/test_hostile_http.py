"""The gateway's door under hostile HTTP: a real process, raw bytes, and what it may answer."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.gateway.test_gateway_process import TOKEN, Running, free_port

from stella_gateway.server import HEAD_SECONDS

PATHS = ("/", "/health", "/health/live", "/health/ready", "/status", "/metrics", "/openapi.json")
KNOWN = {200, 400, 401, 404, 405, 421, 431, 503}
LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with a token and without a bus."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "token").write_text(TOKEN)
    running = Running(folder, free_port(), token_file=str(folder / "token"))
    with running.start():
        assert 200 == running.until("/health/live", lambda answer: answer.status_code == 200).status_code
        yield running


def asked(gateway: Running, data: bytes) -> bytes:
    """Send bytes, and return everything that comes back until the other end closes or falls silent."""
    got = b""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as sock:
        # It may refuse before all of it was sent.
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := sock.recv(65536):
                got += piece
                sock.settimeout(0.5)
    return got


def judged(answer: bytes) -> list[int]:
    """Return the status codes in an answer; none of it is a traceback, a secret or a code that is not documented."""
    codes = [int(code) for code in LINE.findall(answer)]
    assert set(codes) <= KNOWN, answer[:500]
    assert b"Traceback" not in answer and b'File "' not in answer
    assert TOKEN.encode() not in answer
    return codes


def request(path: str, *headers: str, method: str = "GET", keep: bool = False) -> bytes:
    """Return a request to this machine, the last one of its connection unless `keep`."""
    end = ["Connection: keep-alive" if keep else "Connection: close"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, *end, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request("/health", f"X: {'a' * 200_000}"), {400, 431}),
        (request("/" + "a" * 200_000), {400, 431}),
        (request("/health", *(f"X-{n}: y" for n in range(30_000))), {400, 431}),
        (request("/chunks/../../../../etc/passwd"), {404}),
        (request("/chunks/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), {404}),
        (request("//etc/passwd"), {404}),
        (request("/status/..;/"), {404}),
        (request("/%00"), {404}),
        (request("/%ff%fe"), {404}),
        (request("/health/"), {404}),
        (request("/docs"), {404}),
        (request("/status", method="POST"), {405}),
        (request("/status", method="DELETE"), {405}),
        (request("/status", method="TRACE"), {405}),
        (request("/status", method="CONNECT"), {405}),
        (request("http://evil.example/status"), {200, 404, 400}),
        (b"GET /status HTTP/1.1\r\n\r\n", {400}),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", {400}),
        (b"GET /status HTTP/1.1\r\nHost: evil.example\r\n\r\n", {421}),
        (b"GET /status HTTP/9.9\r\nHost: localhost\r\n\r\n", {200, 400}),
        (b"GET /sta\x00tus HTTP/1.1\r\nHost: localhost\r\n\r\n", {400}),
        (b"GET /status HTTP/1.1\r\nHost : localhost\r\n\r\n", {400}),
        (b"GET /status HTTP/1.1\r\nHost: localhost\r\n X: folded\r\n\r\n", {400, 421}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {421, 400}),
        (request("/status", "Content-Length: 5", "Content-Length: 6"), {400}),
        (request("/status", "Content-Length: -1"), {400}),
        (request("/status", "Content-Length: 99999999999999999999999"), {400}),
        (request("/status", "Transfer-Encoding: xchunked"), {400, 501}),
    ],
    ids=range(29),
)
def test_hostile_requests_get_the_answer_that_they_deserve(gateway: Running, data: bytes, expected: set[int]) -> None:
    """Too long, malformed, ambiguous, for another machine, for files: refused, and the process goes on."""
    codes = judged(asked(gateway, data))
    assert codes and set(codes) <= expected, codes
    assert 200 == gateway.get("/health/live").status_code


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        # RFC 9112, section 6.3: chunked wins over a length, so that what follows is a request, and answered as one.
        (("Content-Length: 44", "Transfer-Encoding: chunked"), [503, 200]),
        (("Transfer-Encoding: chunked", "Content-Length: 0"), [503, 200]),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: identity"), [400]),
        (("Transfer-Encoding: \x0bchunked", "Content-Length: 5"), [400]),
        # The length is as said: what is behind it is no body, and what is in it no request.
        (("Content-Length: 51",), [503]),
    ],
)
def test_no_request_is_smuggled_in_anothers_body(
    gateway: Running, headers: tuple[str, ...], expected: list[int]
) -> None:
    """An ambiguous length is refused or read as the standard says; a request in a body is none."""
    hidden = b"0\r\n\r\nGET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert expected == judged(asked(gateway, request("/health/ready", *headers, keep=True) + hidden))
    assert 200 == gateway.get("/health/live").status_code


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "get", "X" * 40]),
    path=st.one_of(
        st.sampled_from(PATHS),
        st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF), max_size=60).map("/".__add__),
        st.tuples(st.sampled_from(PATHS), st.text(max_size=20)).map(lambda p: f"{p[0]}?{p[1]!r}".replace(" ", "+")),
    ),
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                ["Host", "Authorization", "Accept", "Range", "Cookie", "Upgrade", "Expect", "X-Forwarded-For"]
            ),
            st.text(st.characters(min_codepoint=1, max_codepoint=0xFF), max_size=60),
        ),
        max_size=4,
    ),
    rest=st.binary(max_size=80),
)
def test_any_request_gets_a_documented_answer(
    gateway: Running, method: str, path: str, headers: list[tuple[str, str]], rest: bytes
) -> None:
    """Every route, any method, path, header and rest: a documented code, no traceback, no secret."""
    head = "\r\n".join(
        [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            *(f"{k}: {v}" for k, v in headers),
            "Connection: close",
            "",
            "",
        ]
    )
    judged(asked(gateway, head.encode("utf-8", "replace") + rest))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_leave_it_alive(gateway: Running, data: bytes) -> None:
    """What is no HTTP at all is refused or left without an answer."""
    judged(asked(gateway, data + b"\r\n\r\n"))


def test_every_answer_carries_the_browsers_locks(gateway: Running) -> None:
    """Refusals too: no framing, no foreign scripts, no sniffing, no storing."""
    for path in (*PATHS, "/absent"):
        for headers in ({}, {"Host": "evil.example"}):
            answer = gateway.get(path, **headers)
            assert "default-src 'none'" in answer.headers["content-security-policy"], path
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert ("nosniff", "no-store", "no-referrer") == tuple(
                answer.headers[name] for name in ("x-content-type-options", "cache-control", "referrer-policy")
            )
            assert "server" not in answer.headers


def test_connections_that_say_nothing_or_drip_do_not_keep_others_out(gateway: Running) -> None:
    """As many as there may be are taken; each is closed when no whole request has come in time."""
    idle = [socket.create_connection(("127.0.0.1", gateway.port), timeout=5) for _ in range(70)]
    try:
        for sock in idle[::2]:
            sock.sendall(b"GET /health/live HTTP/1.1\r\nX: ")
        began = time.monotonic()
        answered = gateway.until("/health/live", lambda answer: answer.status_code == 200, HEAD_SECONDS + 5)
        assert 200 == answered.status_code
        assert time.monotonic() - began < HEAD_SECONDS + 4
        for sock in idle:
            with contextlib.suppress(ConnectionResetError):
                judged(sock.recv(4096))
    finally:
        for sock in idle:
            sock.close()


def test_the_log_has_no_traceback_and_no_token(gateway: Running) -> None:
    """After all of the above."""
    text = (Path(gateway.folder) / "gateway.log").read_text()
    assert "Traceback" not in text
    assert TOKEN not in text
