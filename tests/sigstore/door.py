"""A loopback HTTP door on a thread, with switches for what goes wrong between two machines.

The log's stand-in, the timestamp authority and the TUF repository stand behind it.
Every switch may be turned while the door is open.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    """What a client asked: `query` holds the last value of each name."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What it is answered."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """Return the body decoded."""
        return json.loads(self.body)

    def with_json(self, value: Any) -> Reply:
        """Return the same reply with another body."""
        return replace(self, body=json.dumps(value).encode())


def json_reply(status: int, value: Any, headers: dict[str, str] | None = None) -> Reply:
    """Return a reply with a JSON body."""
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


Answer = Callable[[Request], Reply]
Route = Callable[[Request], tuple[str, Answer] | None]
Tamper = Callable[[str, Reply], Reply]


@dataclass
class _Fault:
    kind: str
    left: int
    on: str
    reply: Reply = Reply(503)
    seconds: float = 0.0


class Door:
    """Serves `route` on a port of its own until the `with` block ends.

    `route` gives a request's endpoint name and what answers it, or None for a path that is not there (404).
    `requests` counts requests by endpoint name, those that a fault ended too.
    An error inside an answer is a 500 for the client, and is raised at the end of the block.
    """

    def __init__(self, route: Route, server_name: str, faults_on: str) -> None:
        self.requests: Counter[str] = Counter()
        self._route, self._server_name, self._faults_on = route, server_name, faults_on
        self._faults: list[_Fault] = []
        self._tamper: Tamper | None = None
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []
        self._server = _Server(self, 0)
        self._retired: list[_Server] = []
        self.port = int(self._server.server_address[1])
        self.host = f"127.0.0.1:{self.port}"
        self.url = f"http://{self.host}"

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for server in (*self._retired, self._server):
            server.join()
        if self._errors and error is None:
            raise self._errors[0]

    def down(self) -> None:
        """Cut every connection, and refuse new ones.  What was left hanging is not done."""
        self._server.close()
        self._retired.append(self._server)
        # Bound and not listening: the port stays ours, and who connects is refused.
        self._server = _Server(self, self.port)

    def up(self) -> None:
        """Listen, on the same port as ever."""
        if not self._server.listening:
            self._server.open()

    def fail_next(
        self, n: int, status: int, headers: dict[str, str] | None = None, body: bytes = b"injected\n", on: str = ""
    ) -> None:
        """Answer the next `n` requests with this status, and do nothing of what they ask.

        `on` is a part of the names of the endpoints that are meant; without it, those that write.
        """
        self._add(_Fault("fail", n, on or self._faults_on, reply=Reply(status, body, headers or {})))

    def drop_replies(self, n: int, on: str = "") -> None:
        """Do what the next `n` requests ask, and cut the connection instead of answering."""
        self._add(_Fault("drop", n, on or self._faults_on))

    def hang(self, n: int, seconds: float, on: str = "") -> None:
        """Leave the next `n` requests without an answer for so long, then do what they ask."""
        self._add(_Fault("hang", n, on or self._faults_on, seconds=seconds))

    def tamper(self, fn: Tamper | None) -> None:
        """Let `fn(endpoint, reply)` change each reply before it is sent; None ends that."""
        self._tamper = fn

    def calm(self) -> None:
        """Forget every fault that is still to come, and the tampering."""
        with self._lock:
            self._faults.clear()
        self._tamper = None

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _next_fault(self, endpoint: str) -> _Fault | None:
        with self._lock:
            self.requests[endpoint] += 1
            for fault in self._faults:
                if fault.left > 0 and fault.on in endpoint:
                    fault.left -= 1
                    return fault
        return None

    def answer(self, request: Request, ended: threading.Event) -> Reply | None:
        """Return the reply, or None to cut the connection; `ended` is set when the server goes down."""
        found = self._route(request)
        if found is None:
            return json_reply(404, {"code": 404, "message": f"no such path: {request.path}"})
        endpoint, answer = found
        fault = self._next_fault(endpoint)
        if fault is not None and fault.kind == "fail":
            return fault.reply
        if fault is not None and fault.kind == "hang" and ended.wait(fault.seconds):
            return None
        try:
            reply = answer(request)
            if self._tamper is not None:
                reply = self._tamper(endpoint, reply)
        except Exception as error:
            self._errors.append(error)
            return json_reply(500, {"code": 500, "message": f"{type(error).__name__}: {error}"})
        return None if fault is not None and fault.kind == "drop" else reply


class _Server(ThreadingHTTPServer):
    """A threading server that can be closed at once, with all of its connections."""

    request_queue_size = 128

    def __init__(self, door: Door, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.door = door
        self.listening = False
        self.ended = threading.Event()
        self._handlers: list[threading.Thread] = []
        self._connections: set[socket.socket] = set()
        self._guard = threading.Lock()
        self.server_bind()

    def server_bind(self) -> None:
        # Not HTTPServer's: it asks the resolver for a name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def open(self) -> None:
        self.server_activate()
        self.listening = True
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, name="door")
        self._thread.start()

    def close(self) -> None:
        self.ended.set()
        if self.listening:
            self.shutdown()
            self._thread.join()
        with self._guard:
            self.listening = False
            for connection in self._connections:
                _cut(connection)
        self.socket.close()

    def join(self) -> None:
        for thread in self._handlers:
            thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), name="door")
        with self._guard:
            self._connections.add(request)
            self._handlers = [one for one in self._handlers if one.is_alive()]
            self._handlers.append(thread)
            thread.start()

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that is gone, or that was cut off, is nothing to report.
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.door._errors.append(error)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client was quicker


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave in one piece; in two, the second waits for the first one's acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.door.answer(Request(self.command, parts.path, query, headers, body), self.server.ended)
        if reply is None:
            self.close_connection = True
            _cut(self.connection)
            return
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)
        self.wfile.flush()

    do_GET = _serve
    do_POST = _serve

    def version_string(self) -> str:
        return self.server.door._server_name

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `requests` counts."""
