"""What one subject was seen to do: events grouped by what they did, counted, with their first and last line.

Pure, and bounded: of each kind at most `MAX_THINGS` different things are told apart; what comes after that is
counted and not named.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

MAX_THINGS: Final = 50_000
MAX_CONTAINERS: Final = 10_000
_TEXT_MAX: Final = 1024
_KINDS: Final = ("files", "programs", "connections", "functions", "tls")


class Place(NamedTuple):
    """A line: its chunk, its number there counted from 1, its boot and time since that boot."""

    chunk: int
    line: int
    boot_id: str
    ts_ns: int


class Line(msgspec.Struct, frozen=True):
    """What is read of an evidence line."""

    boot_id: str
    ts_ns: int
    event: dict[str, Any]
    container_id: str = ""
    image_digest: str = ""
    image_name: str = ""
    image_repo_digests: list[str] = []
    in_kubernetes: dict[str, Any] = msgspec.field(name="pod", default_factory=dict)
    exe: str = ""
    exe_build_id: str = ""

    @property
    def pod(self) -> str:
        """The pod's name, "" outside Kubernetes."""
        return str(self.in_kubernetes.get("name") or "")


class Thing:
    """One thing that was done: in how many events, and the first and the last line of it.

    `amount` is bytes of TLS, and calls of functions, of which one event may stand for many.
    """

    __slots__ = ("amount", "count", "first", "last")

    def __init__(self, place: Place) -> None:
        self.count = 0
        self.amount = 0
        self.first = self.last = place

    def add(self, place: Place, size: int = 0) -> None:
        """Count one more.  Lines come in the order of the chain, which is not quite that of time."""
        self.count += 1
        self.amount += size
        if self.first.boot_id == place.boot_id and place.ts_ns < self.first.ts_ns:
            self.first = place
        if self.last.boot_id != place.boot_id or place.ts_ns >= self.last.ts_ns:
            self.last = place


class Kind:
    """All things of one kind.  A key is the values of `COLUMNS[kind]`."""

    def __init__(self, limit: int = MAX_THINGS) -> None:
        self.things: dict[tuple[str, ...], Thing] = {}
        self.events = 0
        self.unnamed_events = 0
        self._limit = limit

    def add(self, key: tuple[str, ...], place: Place, size: int = 0) -> None:
        """Count one event."""
        thing = self.things.get(key)
        if thing is None:
            if len(self.things) >= self._limit:
                self.unnamed_events += 1
                return
            thing = self.things[key] = Thing(place)
        thing.add(place, size)

    def top(self, count: int) -> list[tuple[tuple[str, ...], Thing]]:
        """Return the most frequent things; equally frequent ones by name."""
        ordered = sorted(self.things.items(), key=lambda item: (-item[1].count, item[0]))
        return ordered[:count]


#: The same of containers.
CONTAINER_COLUMNS: Final = ("container_id", "pod", "image_name", "image_digest")
#: What tells things of a kind apart, in the order of their key.
COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "files": ("path", "access", "result"),
    "programs": ("program", "build_id", "asked_for", "interpreter", "seen_as"),
    "connections": ("direction", "family", "address", "port", "result"),
    "functions": ("function", "binary", "build_id", "seen_as"),
    "tls": ("direction", "library"),
}


class Sightings:
    """Everything that was seen of the subject.  `throttled` counts events that its own limit kept out."""

    def __init__(self, max_things: int = MAX_THINGS) -> None:
        self.kinds = {name: Kind(max_things) for name in _KINDS}
        self.containers = Kind(MAX_CONTAINERS)
        self.all: Thing | None = None
        self.events_by_chunk: dict[int, int] = {}
        self.unreadable = 0
        self.throttled = 0

    def add(self, line: Line, place: Place) -> None:
        """Take one line of the subject."""
        if self.all is None:
            self.all = Thing(place)
        self.all.add(place)
        self.events_by_chunk[place.chunk] = self.events_by_chunk.get(place.chunk, 0) + 1
        names = (line.container_id, line.pod, line.image_name, line.image_digest)
        self.containers.add(tuple(_text(name) for name in names), place)
        if line.event.get("type") == "throttle":
            # What a limit of its own cost it; the stop of it says how much.
            dropped = line.event.get("dropped")
            self.throttled += dropped if isinstance(dropped, int) else 0
            return
        read = _READERS.get(str(line.event.get("type")))
        if read is None:
            self.unreadable += 1  # a type of a later release: it is in the sum above
            return
        counted: set[str] = set()
        for kind, key, size in (*_program(line), *read(line.event), *_stack(line.event)):
            if kind not in counted:
                self.kinds[kind].events += 1
                counted.add(kind)
            self.kinds[kind].add(key, place, size)


_Row = tuple[str, tuple[str, ...], int]


def _text(value: object) -> str:
    return "" if value is None else str(value)[:_TEXT_MAX]


def outcome(result: object) -> str:
    """Return a call's result in words: `ok`, `in progress`, or the error's name."""
    if not isinstance(result, int) or result >= 0:
        return "ok"
    if -result == errno.EINPROGRESS:
        return "in progress"
    return errno.errorcode.get(-result, str(result))


def _file_open(event: dict[str, Any]) -> Iterator[_Row]:
    path = event.get("path")
    shown = f"(unknown: {_text(event.get('path_reason'))})" if path is None else _text(path)
    yield "files", (shown, _text(event.get("access")), outcome(event.get("result"))), 0


def _program(line: Line) -> Iterator[_Row]:
    """Yield what was started, and what acts: a program may have been running before anybody watched."""
    build_id = _text(line.exe_build_id)
    if line.event.get("type") == "process_exec":
        asked = _text(line.event.get("filename"))
        exe = _text(line.exe) or asked
        yield (
            "programs",
            (exe, build_id, asked if asked != exe else "", _text(line.event.get("interpreter")), "started"),
            0,
        )
    elif line.exe:
        yield "programs", (_text(line.exe), build_id, "", "", "acted"), 0


def _process_exec(event: dict[str, Any]) -> Iterator[_Row]:
    del event  # `_program` has read it
    return iter(())


def _net_connect(event: dict[str, Any]) -> Iterator[_Row]:
    direction = _text(event.get("direction"))
    address = event.get("address")
    shown = f"(unknown: {_text(event.get('address_reason'))})" if address is None else _text(address)
    # A caller's own port is another one each time: whoever accepts is told by the port that was called.
    port = event.get("local_port") if direction == "accept" else event.get("port")
    yield "connections", (direction, _text(event.get("family")), shown, _text(port), outcome(event.get("result"))), 0


def _tcp_state(event: dict[str, Any]) -> Iterator[_Row]:
    old, new = event.get("old_state"), event.get("new_state")
    family = _text(event.get("family"))
    source = (_text(event.get("source_address")), _text(event.get("source_port")))
    peer = _text(event.get("destination_address"))
    if new == "LISTEN":
        yield "connections", ("listen", family, *source, "ok"), 0
    elif new == "ESTABLISHED" and old == "SYN_SENT":
        yield "connections", ("tcp out", family, peer, _text(event.get("destination_port")), "established"), 0
    elif new == "ESTABLISHED":
        yield "connections", ("tcp in", family, peer, source[1], "established"), 0
    elif new == "CLOSE" and old == "SYN_SENT":
        yield "connections", ("tcp out", family, peer, _text(event.get("destination_port")), "refused"), 0
    else:
        yield "connections", ("tcp", family, "(other changes of state)", "", ""), 0


def _ssl_op(event: dict[str, Any]) -> Iterator[_Row]:
    size = event.get("bytes")
    key = (_text(event.get("direction")), _text(event.get("library")))
    yield "tls", key, size if isinstance(size, int) and size > 0 else 0


def _function_call(event: dict[str, Any]) -> Iterator[_Row]:
    count = event.get("count")
    yield "functions", (*_function(event), "called"), count if isinstance(count, int) and count > 0 else 1


def _stack(event: dict[str, Any]) -> Iterator[_Row]:
    """Yield the functions on the caller's stack, where the event carries one."""
    for frame in event.get("stack") or ():
        if isinstance(frame, dict):
            yield "functions", (*_function(frame), "in a stack"), 0


def _function(frame: dict[str, Any]) -> tuple[str, str, str]:
    offset = frame.get("offset") if frame.get("offset") is not None else frame.get("file_offset")
    name = frame.get("symbol") or (f"+0x{offset:x}" if isinstance(offset, int) else "(unknown)")
    return _text(name), _text(frame.get("binary")), _text(frame.get("build_id"))


_READERS: Final[dict[str, Callable[[dict[str, Any]], Iterator[_Row]]]] = {
    "file_open": _file_open,
    "process_exec": _process_exec,
    "net_connect": _net_connect,
    "tcp_state": _tcp_state,
    "ssl_op": _ssl_op,
    "function_call": _function_call,
}
