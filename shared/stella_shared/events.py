"""Events: the kernel's records, and the evidence lines they become.

`pid` here is the kernel's tgid, the number users call pid; `tid` is the thread.  Bytes that are no UTF-8
(names may hold any byte but zero) are written as `\\xNN` escapes, so a line is always text.

One evidence line is one JSON object with sorted keys and no spaces (RFC 8785), ended by a newline.
Integers keep all their digits, beyond 2^53 too: see docs/decisions/0001-exact-integers.md.  Unknown is never
silent: a field that is missing where one would look for it has a `…_reason` beside it.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from stella_shared.errors import BrokenPromise

EVENT_TYPES: Final = ("file_open", "process_exec", "tcp_state", "net_connect", "ssl_op", "function_call", "throttle")

# ---- records: bpf/include/stella_record.h, decoded -------------------------------------------------------

#: ts_ns seq cgroup_id start_ns program tgid tid uid lane type call size comm: a record as it stands in the ring.
RECORD_HEADER: Final = struct.Struct("<QQQQQIIIIHHI16s")
FILE_OPEN_BODY: Final = struct.Struct("<qQQQIiIHHBBBBI")
#: Before the ancestors, which are ANCESTORS_MAX times ANCESTOR.
PROCESS_EXEC_BODY: Final = struct.Struct("<QIIHHHHBBBBI")
ANCESTOR: Final = struct.Struct("<QII16s")
ANCESTORS_MAX: Final = 6
TCP_STATE_BODY: Final = struct.Struct("<HHHBB16s16sII")
NET_CONNECT_BODY: Final = struct.Struct("<qiHHHHBBBB16s16s")
SSL_OP_BODY: Final = struct.Struct("<qQII")
FUNCTION_CALL_BODY: Final = struct.Struct("<QQQQIHBB20sI")
THROTTLE_BODY: Final = struct.Struct("<QQQQII")
STACK_FRAME: Final = struct.Struct("<i20sQ")
#: Frames stand behind a path buffer of this fixed size.
NET_PATH_BYTES: Final = 112

FILE_OPEN, PROCESS_EXEC, TCP_STATE, NET_CONNECT, SSL_OP, FUNCTION_CALL, THROTTLE = 1, 2, 3, 4, 5, 6, 7
TYPE_NAMES: Final = {
    FILE_OPEN: "file_open",
    PROCESS_EXEC: "process_exec",
    TCP_STATE: "tcp_state",
    NET_CONNECT: "net_connect",
    SSL_OP: "ssl_op",
    FUNCTION_CALL: "function_call",
    THROTTLE: "throttle",
}
#: enum stella_call → `src` of the evidence line.
CALL_SOURCES: Final = (
    "sys_enter_open",
    "sys_enter_openat",
    "sys_enter_openat2",
    "sched_process_exec",
    "inet_sock_set_state",
    "sys_enter_connect",
    "sys_enter_accept",
    "sys_enter_accept4",
    "uprobe:connect",
    "uprobe:accept",
    "uprobe:accept4",
    "uprobe:SSL_read",
    "uprobe:SSL_write",
    "uprobe:SSL_read_ex",
    "uprobe:SSL_write_ex",
    "uprobe:function_entry",
    "throttle",
)
#: Which type of record each call makes.
CALL_TYPES: Final = (1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 6, 7)
_STATUS_OK, _STATUS_TRUNCATED, _STATUS_FAULT, _STATUS_ABSENT = 0, 1, 2, 3
_WALKED_FILE, _WALKED_DIRECTORY = 1, 2
_WALK_CUT, _WALK_UNLINKED, _WALK_DETACHED = 1, 2, 4
_FAULT_REASON: Final = "the address could not be read"
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_FAMILIES: Final = {_AF_UNIX: "unix", _AF_INET: "ipv4", _AF_INET6: "ipv6"}
_TCP_STATES: Final = (
    "NONE",
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
    "BOUND_INACTIVE",
)
_O_PATH: Final = 0o10000000
_ACCESS: Final[tuple[Literal["read", "write", "read_write"], ...]] = ("read", "write", "read_write", "read_write")
_ATTRIBUTIONS: Final = ("none", "current", "socket_owner")

# ---- evidence lines ---------------------------------------------------------------------------------------

Nat = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class _Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag_field="type"):
    """What happened.  `type` says which of the kinds below."""


class StackFrame(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One frame of the caller's user stack, innermost first."""

    build_id: Annotated[str, Meta(description="GNU build-id of the file, hex.")] | None = None
    offset: Annotated[int, Meta(ge=0, description="Offset in that file.")] | None = None
    symbol: (
        Annotated[
            str, Meta(description="The function, demangled; `addr:0x…` where the frame belongs to no known file.")
        ]
        | None
    ) = None
    symbol_offset: Annotated[int, Meta(ge=0, description="Offset from the function's begin.")] | None = None
    symbol_reason: Annotated[str, Meta(description="Why the function is not known.")] | None = None
    symbol_source: (
        Annotated[
            str,
            Meta(
                description="The table that names it: symtab, dynsym, minidebuginfo or gopclntab of the file, or "
                "`debug_file:` and a table of its separate debug file; `watched_function`: the name by which the "
                "watched function was found in the file."
            ),
        ]
        | None
    ) = None


class FileOpen(_Event, frozen=True, tag="file_open"):
    """A file was opened, or the attempt was refused: `result` says which."""

    access: Annotated[
        Literal["read", "write", "read_write", "path"],
        Meta(description="Access mode out of `flags`; `path` for O_PATH, which opens no content."),
    ]
    flags: Annotated[int, Meta(ge=0, description="open(2) flags.")]
    mode: Annotated[int, Meta(ge=0, description="Creation mode as passed, before the umask.")]
    path_source: Annotated[
        Literal["kernel_file", "kernel_directory_and_user_pointer", "user_pointer_at_exit"],
        Meta(
            description="How sure the path is. `kernel_file`: the kernel's own path of the file that was opened. "
            "`user_pointer_at_exit`: the caller's string, read after the kernel had used it; a process can change "
            "its own string in between. `kernel_directory_and_user_pointer`: that string, behind the kernel's own "
            "path of the directory it starts from."
        ),
    ]
    result: Annotated[int, Meta(description="File descriptor, or -errno when the open was refused.")]
    device: (
        Annotated[str, Meta(description="Device of the opened file, major:minor, where the kernel told.")] | None
    ) = None
    dfd: Annotated[int, Meta(description="Directory a relative path starts from; -100: the cwd.")] | None = None
    inode: Annotated[int, Meta(ge=0, description="Inode of the opened file, where the kernel told.")] | None = None
    path: (
        Annotated[
            str,
            Meta(description="The path, from the root of the process's mount namespace; relative only with a reason."),
        ]
        | None
    ) = None
    path_given: Annotated[str, Meta(description="The path as the caller wrote it, where that is another.")] | None = (
        None
    )
    path_reason: Annotated[str, Meta(description="Why there is no path.")] | None = None
    resolve: Annotated[int, Meta(ge=0, description="openat2(2) resolve flags, when any.")] | None = None
    stack: Annotated[list[StackFrame], Meta(description="Who called, where `probes.stacks` asks for it.")] | None = None
    symbolizer: (
        Annotated[
            str, Meta(description="What has named the frames: its version and those of the libraries it reads with.")
        ]
        | None
    ) = None


class Ancestor(msgspec.Struct, frozen=True, kw_only=True):
    """A process that another one descends from: with `start_ns` no other process can be meant."""

    comm: str
    pid: Nat
    start_ns: Nat


class ProcessExec(_Event, frozen=True, tag="process_exec"):
    """A process began to run a program."""

    argv: Annotated[list[str], Meta(description="Arguments, the first 2,048 bytes of them; `***` stands for a secret.")]
    filename: Annotated[
        str,
        Meta(
            description="The program as it was asked for, made absolute; the script when it is one. What really runs "
            "is the line's `exe`."
        ),
    ]
    ppid: Annotated[int, Meta(ge=0, description="The parent; 0 for none.")]
    ancestors: (
        Annotated[list[Ancestor], Meta(description="Parent, its parent and so on, six at the most, by the kernel.")]
        | None
    ) = None
    argv_bytes: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="Bytes of arguments the process was given. Absent where something was redacted: it would "
                "tell how long the secret is.",
            ),
        ]
        | None
    ) = None
    argv_reason: Annotated[str, Meta(description="Why argv is not complete.")] | None = None
    argv_redacted: (
        Annotated[list[Nat], Meta(description="Indexes of the arguments in which a secret was replaced, ascending.")]
        | None
    ) = None
    argv_truncated: Annotated[bool, Meta(description="Whether argv was cut.")] = False
    device: Annotated[str, Meta(description="Device of the file of `exe`, major:minor.")] | None = None
    filename_given: (
        Annotated[str, Meta(description="The program as it was asked for, where that was relative.")] | None
    ) = None
    filename_reason: Annotated[str, Meta(description="Why a relative filename is not absolute.")] | None = None
    filename_truncated: bool = False
    inode: Annotated[int, Meta(ge=0, description="Inode of the file of `exe`.")] | None = None
    interpreter: Annotated[str, Meta(description="What runs it, when `filename` is a script.")] | None = None
    stack: (
        Annotated[
            list[StackFrame],
            Meta(description="Who called execve(2), of the program before, where `probes.stacks` asks for it."),
        ]
        | None
    ) = None
    symbolizer: (
        Annotated[
            str, Meta(description="What has named the frames: its version and those of the libraries it reads with.")
        ]
        | None
    ) = None


class TcpState(_Event, frozen=True, tag="tcp_state"):
    """A TCP socket changed its state."""

    attribution: Annotated[
        Literal["none", "current", "socket_owner"],
        Meta(
            description="`current`: the named process made this change. `socket_owner`: the change came from the "
            "network; named is who connected, accepted or listened on this socket. `none`: not known, so no "
            "process is named, and `cgroup_id` is that of the socket."
        ),
    ]
    destination_address: str
    destination_port: Port
    family: Literal["ipv4", "ipv6", "other"]
    new_state: str
    old_state: str
    source_address: str
    source_port: Port


class NetConnect(_Event, frozen=True, tag="net_connect"):
    """A process called connect(2), or took a connection with accept(2): `result` says how it ended."""

    address_source: Annotated[
        Literal["user_pointer_at_exit", "kernel_socket"],
        Meta(description="Where the peer's address was read: the caller's memory, or the kernel's socket."),
    ]
    direction: Literal["connect", "accept"]
    family: Annotated[str, Meta(description="ipv4, ipv6, unix, or af_<number>.")]
    fd: Annotated[int, Meta(description="The descriptor that was passed.")]
    result: Annotated[int, Meta(description="0 or the new descriptor, or -errno (-115: in progress).")]
    abstract: Annotated[bool, Meta(description="The UNIX name lives in the abstract namespace, no file.")] = False
    address: Annotated[str, Meta(description="Peer address; the socket's name for UNIX.")] | None = None
    address_reason: Annotated[str, Meta(description="Why there is no address.")] | None = None
    local_address: str | None = None
    local_port: Port | None = None
    port: Port | None = None
    stack: list[StackFrame] | None = None
    symbolizer: (
        Annotated[
            str, Meta(description="What has named the frames: its version and those of the libraries it reads with.")
        ]
        | None
    ) = None


class SslOp(_Event, frozen=True, tag="ssl_op"):
    """A TLS library moved plaintext.  How much, never what."""

    bytes: Annotated[int, Meta(ge=0, description="Plaintext bytes moved; 0 when the call failed.")]
    direction: Literal["read", "write"]
    library: Annotated[str, Meta(description="Path of the TLS library.")]
    result: Annotated[int, Meta(description="The library call's return value.")]


class FunctionCall(_Event, frozen=True, tag="function_call"):
    """A watched function was called, once or `count` times.  Its entry was reached; how it went on is not known."""

    binary: Annotated[str, Meta(description="The file that holds it, by the name that the process has for it.")]
    offset: Annotated[int, Meta(ge=0, description="Of the function's begin in that file.")]
    symbol: Annotated[str, Meta(description="The function, demangled where that was possible.")]
    build_id: Annotated[str, Meta(description="GNU build-id of the file, hex; absent when it has none.")] | None = None
    count: (
        Annotated[
            int,
            Meta(
                ge=1,
                description="Calls that this line stands for, where calls are counted. `comm` is then the main "
                "thread's, and `tid` is `pid`.",
            ),
        ]
        | None
    ) = None
    first_ns: Annotated[int, Meta(ge=0, description="When the first of them was, ns since boot.")] | None = None
    last_ns: Annotated[int, Meta(ge=0, description="When the last of them was.")] | None = None
    stack: Annotated[list[StackFrame], Meta(description="The function itself, then its callers.")] | None = None
    symbol_mangled: Annotated[str, Meta(description="The name as the file has it, where it differs.")] | None = None
    symbol_reason: Annotated[str, Meta(description="Why `symbol` is not demangled.")] | None = None
    symbol_truncated: Annotated[bool, Meta(description="`symbol_mangled` was cut after 200 bytes.")] = False
    symbolizer: (
        Annotated[
            str, Meta(description="What has named the frames: its version and those of the libraries it reads with.")
        ]
        | None
    ) = None


class Throttle(_Event, frozen=True, tag="throttle"):
    """A limit of the configuration began to cost records, or ceased to.  Names no process: it is about many.

    What it cost is part of the chunk's losses, cause `rate_limit`; this line says when, and whose.
    """

    limit_per_second: Annotated[int, Meta(ge=0, description="The limit, in tenths of a second rounded up.")]
    scope: Annotated[
        Literal["node", "cgroup"],
        Meta(description="`cgroup`: the limit of each container, and the line's `cgroup_id` is whose. `node`: of all."),
    ]
    since_ns: Annotated[int, Meta(ge=0, description="When the limit began to cost records, ns since boot.")]
    state: Annotated[
        Literal["start", "stop"], Meta(description="A stop comes when it has cost nothing for 300 ms, or is lifted.")
    ]
    dropped: Annotated[int, Meta(ge=0, description="Of a stop: the records that it cost meanwhile.")] | None = None
    until_ns: Annotated[int, Meta(ge=0, description="Of a stop: when it last cost one.")] | None = None


Event = FileOpen | ProcessExec | TcpState | NetConnect | SslOp | FunctionCall | Throttle


class Pod(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where Kubernetes put a container, in its runtime's words."""

    name: str
    namespace: str
    container: Annotated[str, Meta(description="Its name in the pod; absent for the pod's own sandbox.")] | None = None


class EvidenceLine(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One evidence line: what happened, who did it, where, and under which number."""

    boot_id: Annotated[str, Meta(pattern="^[0-9a-f]{32}$", description="The kernel's boot id.")]
    cgroup_id: Annotated[int, Meta(ge=0, description="cgroup v2 id.")]
    event: Event
    lane: Annotated[int, Meta(ge=0, description="Which counter numbered it: cpu * 4 + kind of program.")]
    node: str
    run: Annotated[str, Meta(pattern="^[0-9a-f]{16}$", description="One life of the loaded probes.")]
    seq: Annotated[int, Meta(ge=0, description="Number in its lane and run.")]
    src: Annotated[str, Meta(description="The probe.")]
    ts_ns: Annotated[int, Meta(ge=0, description="CLOCK_BOOTTIME: ns since boot.")]
    comm: Annotated[str, Meta(max_length=64, description="Thread name.")] | None = None
    container_id: (
        Annotated[
            str,
            Meta(
                pattern="^((docker|containerd|cri-o|podman)://[0-9a-f]{64}|unknown:[0-9]+)$",
                description="Absent for a process of the host.",
            ),
        ]
        | None
    ) = None
    container_reason: Annotated[str, Meta(description="Why the container is unknown.")] | None = None
    exe: (
        Annotated[
            str,
            Meta(
                description="The program that the process runs: the kernel's path of its file, from the root of its "
                "mount namespace, at the program's first event."
            ),
        ]
        | None
    ) = None
    exe_build_id: Annotated[str, Meta(description="GNU build-id of that file, hex.")] | None = None
    exe_reason: Annotated[str, Meta(description="What is not known of the program, and why.")] | None = None
    image_digest: Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")] | None = None
    image_digest_kind: Annotated[Literal["config", "manifest"], Meta(description="Which digest it is.")] | None = None
    image_name: (
        Annotated[str, Meta(max_length=512, description="The image's name as the container was made with it.")] | None
    ) = None
    image_reason: Annotated[str, Meta(description="Why the container's image is unknown.")] | None = None
    image_repo_digests: (
        Annotated[
            list[str],
            Meta(max_length=8, description="`name@sha256:…` under which registries know the image's manifest, sorted."),
        ]
        | None
    ) = None
    labels: (
        Annotated[
            dict[str, str],
            Meta(
                max_length=16,
                description="Labels of the container that signals.runtimes.labels chooses; a value "
                "that was cut ends with `…`.",
            ),
        ]
        | None
    ) = None
    pid: Annotated[int, Meta(ge=1)] | None = None
    pod: Pod | None = None
    start_ns: (
        Annotated[
            int, Meta(ge=1, description="Start of the process, ns since boot: with `pid` and `boot_id`, its identity.")
        ]
        | None
    ) = None
    tid: Annotated[int, Meta(ge=1)] | None = None
    uid: Nat | None = None


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of an evidence line, made from the types above."""
    schema = msgspec.json.schema(EvidenceLine)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Stella Signals evidence line",
        **schema,
    }


_line_encoder = msgspec.json.Encoder(order="sorted")
_line_decoder = msgspec.json.Decoder(EvidenceLine)


def encode_line(line: EvidenceLine) -> bytes:
    """Return the canonical bytes of a line, newline included."""
    return _line_encoder.encode(line) + b"\n"


def decode_line(data: bytes | str) -> EvidenceLine:
    """Parse one line.  Raises `BrokenPromise` naming what is wrong with it."""
    try:
        return _line_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise BrokenPromise(f"evidence line: {e}") from None


# ---- from record to event ----------------------------------------------------------------------------------


class Record(msgspec.Struct, frozen=True, gc=False):
    """One kernel record, its header decoded.  `body` is what follows the header, padding included."""

    ts_ns: int
    seq: int
    cgroup_id: int
    start_ns: int
    program: int
    tgid: int
    tid: int
    uid: int
    lane: int
    type: int
    call: int
    comm: bytes
    body: bytes


# ---- batches -------------------------------------------------------------------------------------------------
#
# Most records repeat what others say, so a batch says each distinct thing once (ring.c does the same in C):
#
#     u32 whos, u32 whats, u32 events, u32 bytes of whats
#     whos    each: u64 cgroup_id, u64 start_ns, u64 program, u32 tgid, u32 tid, u32 uid, u32 lane
#     whats   each: u16 type, u16 call, u32 stride, char comm[16], body, zeros up to 8 bytes
#     events  each: u64 ts_ns, u64 seq, u32 who, u32 what
#
# Little-endian; no records at all are no bytes at all.

BATCH_COUNTS: Final = struct.Struct("<4I")
WHO: Final = struct.Struct("<QQQIIII")
WHAT: Final = struct.Struct("<HHI16s")
EVENT: Final = struct.Struct("<QQII")


class Batch(msgspec.Struct, frozen=True):
    """A batch taken apart: rows of `WHO`, whole whats with head and body, rows of `EVENT`."""

    whos: list[tuple[int, int, int, int, int, int, int]]
    whats: list[bytes]
    events: list[tuple[int, int, int, int]]


def pack_batch(raw: Iterable[bytes]) -> bytes:
    """Return the batch of kernel records as they come out of the ring, each with its header."""
    whos: dict[tuple[int, int, int, int, int, int, int], int] = {}
    whats: dict[bytes, int] = {}
    events = bytearray()
    count = 0
    for record in raw:
        ts, seq, *someone, kind, call, size, comm = RECORD_HEADER.unpack_from(record)
        body = record[RECORD_HEADER.size : size]
        stride = (WHAT.size + len(body) + 7) & ~7
        what = (WHAT.pack(kind, call, stride, comm) + body).ljust(stride, b"\0")
        who = whos.setdefault(tuple(someone), len(whos))
        events += EVENT.pack(ts, seq, who, whats.setdefault(what, len(whats)))
        count += 1
    if not count:
        return b""
    said = b"".join(whats)
    head = BATCH_COUNTS.pack(len(whos), len(whats), count, len(said))
    return b"".join([head, *(WHO.pack(*who) for who in whos), said, bytes(events)])


def unpack_batch(data: bytes) -> Batch:
    """Take a batch apart.  Raises `BrokenPromise` when it cannot be one."""
    if not data:
        return Batch([], [], [])
    if len(data) < BATCH_COUNTS.size:
        raise BrokenPromise(f"a batch of {len(data)} bytes")
    whos, whats, events, said = BATCH_COUNTS.unpack_from(data)
    begin = BATCH_COUNTS.size + whos * WHO.size
    end = begin + said
    if len(data) != end + events * EVENT.size:
        raise BrokenPromise(f"a batch of {len(data)} bytes should have {end + events * EVENT.size}")
    found: list[bytes] = []
    at = begin
    while at < end:
        stride = WHAT.unpack_from(data, at)[2] if end - at >= WHAT.size else 0
        if stride < WHAT.size or stride % 8 or stride > end - at:
            raise BrokenPromise(f"a what at {at} of {end} claims {stride} bytes")
        found.append(data[at : at + stride])
        at += stride
    rows = list(EVENT.iter_unpack(data[end:]))
    if len(found) != whats or any(who >= whos or what >= whats for _, _, who, what in rows):
        raise BrokenPromise("a batch speaks of things that it does not hold")
    return Batch(list(WHO.iter_unpack(data[BATCH_COUNTS.size : begin])), found, rows)


class Names(msgspec.Struct, frozen=True):
    """The distinct cgroup ids of a batch, and for each distinct program key a process: (pid, start_ns)."""

    cgroups: set[int]
    programs: dict[int, tuple[int, int]]


def names(data: bytes) -> Names:
    """Return what a batch needs names for, nothing for what is no batch."""
    if len(data) < BATCH_COUNTS.size:
        return Names(set(), {})
    whos = data[BATCH_COUNTS.size :][: BATCH_COUNTS.unpack_from(data)[0] * WHO.size]
    rows = list(WHO.iter_unpack(whos[: len(whos) // WHO.size * WHO.size]))
    return Names({row[0] for row in rows}, {row[2]: (row[3], row[1]) for row in rows})


def oldest_ns(data: bytes) -> int:
    """Return the time of the first event of a batch, 0 for what is no batch."""
    if len(data) < BATCH_COUNTS.size + EVENT.size:
        return 0
    whos, _, _, said = BATCH_COUNTS.unpack_from(data)
    at = BATCH_COUNTS.size + whos * WHO.size + said
    return int(EVENT.unpack_from(data, at)[0]) if at + EVENT.size <= len(data) else 0


def records(data: bytes) -> Iterator[Record]:
    """Yield the records of a batch.  Raises `BrokenPromise` when it cannot be one."""
    batch = unpack_batch(data)
    heads = [WHAT.unpack_from(what) for what in batch.whats]
    for ts, seq, who, what in batch.events:
        kind, call, _, comm = heads[what]
        yield Record(
            ts, seq, *batch.whos[who], kind, call, comm.split(b"\0", 1)[0], batch.whats[what][WHAT.size :]
        )  # fmt: skip


def text(raw: bytes) -> str:
    """Return bytes as text; what is no UTF-8 becomes `\\xNN`."""
    return raw.decode("utf-8", "backslashreplace")


def _cut(body: bytes, start: int, length: int) -> bytes:
    piece = body[start : start + length]
    if len(piece) != length:
        raise BrokenPromise(f"a record's text runs {length - len(piece)} bytes over its end")
    return piece


def _file_open(body: bytes) -> FileOpen:
    (result, flags, resolve, inode, mode, dfd, device, length, walked_length, status, kind, walked_flags, frames, _) = (
        FILE_OPEN_BODY.unpack_from(body)
    )
    access: Literal["read", "write", "read_write", "path"] = _ACCESS[flags & 3]
    if flags & _O_PATH:
        access = "path"
    given = None if status == _STATUS_FAULT else text(_cut(body, FILE_OPEN_BODY.size, length))
    walked = text(_cut(body, FILE_OPEN_BODY.size + length, walked_length))
    path, source, reason = _sure_path(given, walked, kind, walked_flags)
    return FileOpen(
        access=access,
        flags=flags,
        mode=mode,
        path_source=source,
        result=result,
        device=device_text(device) if kind == _WALKED_FILE else None,
        dfd=dfd if given is not None and not given.startswith("/") else None,
        inode=inode if kind == _WALKED_FILE else None,
        path=path,
        path_given=given if given != path else None,
        path_reason=reason,
        resolve=resolve or None,
        stack=_stack(body, FILE_OPEN_BODY.size + length + walked_length, frames),
    )


_PathSource = Literal["kernel_file", "kernel_directory_and_user_pointer", "user_pointer_at_exit"]


def _sure_path(given: str | None, walked: str, kind: int, flags: int) -> tuple[str | None, _PathSource, str | None]:
    """Return the surest path there is, where it comes from, and what is wrong with it."""
    if kind == _WALKED_FILE and flags & _WALK_DETACHED:
        return walked.removeprefix("/"), "kernel_file", "the file stands in no directory"
    if kind == _WALKED_FILE and not flags & _WALK_CUT:
        return walked, "kernel_file", "the file was removed" if flags & _WALK_UNLINKED else None
    if given is None:
        return None, "user_pointer_at_exit", _FAULT_REASON
    if given.startswith("/"):
        return given, "user_pointer_at_exit", None
    if kind != _WALKED_DIRECTORY:
        return given, "user_pointer_at_exit", "the directory it starts from is not known"
    if flags & (_WALK_CUT | _WALK_DETACHED):
        return given, "user_pointer_at_exit", "the directory it starts from has a path that is too long"
    return _joined(walked, given), "kernel_directory_and_user_pointer", None


def _joined(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name.removeprefix('./')}" if name else directory


def device_text(device: int) -> str:
    """Return a kernel device number as `major:minor`."""
    return f"{device >> 20}:{device & 0xFFFFF}"


def _process_exec(body: bytes) -> ProcessExec:
    (
        inode, device, total, name, interpreter, argv, directory,
        name_status, argv_status, directory_flags, count, frames,
    ) = PROCESS_EXEC_BODY.unpack_from(body)  # fmt: skip
    ancestors = []
    for i in range(min(count, ANCESTORS_MAX)):
        start_ns, pid, _, comm = ANCESTOR.unpack_from(body, PROCESS_EXEC_BODY.size + i * ANCESTOR.size)
        ancestors.append(Ancestor(comm=text(comm.split(b"\0", 1)[0]), pid=pid, start_ns=start_ns))
    at = PROCESS_EXEC_BODY.size + ANCESTORS_MAX * ANCESTOR.size
    given = text(_cut(body, at, name))
    interpreter_text = text(_cut(body, at + name, interpreter))
    raw = _cut(body, at + name + interpreter, argv)
    words = raw[:-1].split(b"\0") if raw.endswith(b"\0") else raw.split(b"\0") if raw else []
    start = text(_cut(body, at + name + interpreter + argv, directory))
    filename, reason = given, None
    if given and not given.startswith("/"):
        if start and not directory_flags & (_WALK_CUT | _WALK_DETACHED):
            filename = _joined(start, given)
        else:
            reason = "the directory it starts from is not known"
    return ProcessExec(
        ancestors=ancestors,
        argv=[text(word) for word in words],
        argv_bytes=total,
        device=device_text(device),
        filename=filename,
        filename_given=given if given != filename else None,
        filename_reason=reason,
        inode=inode,
        ppid=ancestors[0].pid if ancestors else 0,
        argv_reason=_FAULT_REASON if argv_status == _STATUS_FAULT else None,
        argv_truncated=argv_status == _STATUS_TRUNCATED,
        filename_truncated=name_status == _STATUS_TRUNCATED,
        interpreter=interpreter_text or None,
        stack=_stack(body, at + name + interpreter + argv + directory, frames),
    )


def address_text(family: int, raw: bytes) -> str:
    """Return the text of an address as it stands in a record."""
    if family == _AF_INET:
        return str(ipaddress.IPv4Address(raw[:4]))
    return str(ipaddress.IPv6Address(raw))


def _state(number: int) -> str:
    return _TCP_STATES[number] if number < len(_TCP_STATES) else f"STATE_{number}"


def _tcp_state(body: bytes) -> TcpState:
    family, sport, dport, old, new, source, destination, attribution, _ = TCP_STATE_BODY.unpack_from(body)
    name: Literal["ipv4", "ipv6", "other"] = {_AF_INET: "ipv4", _AF_INET6: "ipv6"}.get(family, "other")  # type: ignore[assignment]
    return TcpState(
        attribution=_ATTRIBUTIONS[attribution if attribution < len(_ATTRIBUTIONS) else 0],
        destination_address=address_text(family, destination),
        destination_port=dport,
        family=name,
        new_state=_state(new),
        old_state=_state(old),
        source_address=address_text(family, source),
        source_port=sport,
    )


def _stack(body: bytes, at: int, frames: int) -> list[StackFrame] | None:
    """Return the frames that stand at a place of a record, None where there are none."""
    if not frames:
        return None
    raw = _cut(body, at, frames * STACK_FRAME.size)
    return [_frame(*frame) for frame in STACK_FRAME.iter_unpack(raw) if frame[0]]


def _frame(status: int, build_id: bytes, offset: int) -> StackFrame:
    if status == 1:
        return StackFrame(build_id=build_id.hex(), offset=offset)
    return StackFrame(symbol=f"addr:0x{offset:x}")


def _net_connect(body: bytes, call: int) -> NetConnect:
    (result, fd, family, port, local_port, length, status, abstract, frames, _, address, local) = (
        NET_CONNECT_BODY.unpack_from(body)
    )
    accept = call in (6, 7, 9, 10)
    at = NET_CONNECT_BODY.size
    stack = _stack(body, at + (NET_PATH_BYTES if call >= 8 else length), frames)
    if call >= 8 and stack is None:
        stack = []
    ip = family in (_AF_INET, _AF_INET6)
    peer: str | None = None
    reason = None
    if status == _STATUS_FAULT:
        reason = _FAULT_REASON
    elif status == _STATUS_ABSENT:
        reason = "the socket has no name" if result >= 0 or not accept else "no connection was taken"
    elif ip:
        peer = address_text(family, address)
    elif family == _AF_UNIX:
        name = _cut(body, at, length)
        peer = "@" + text(name[1:]) if abstract else text(name.split(b"\0", 1)[0])
    else:
        reason = "an address of this family is not decoded"
    return NetConnect(
        address_source="kernel_socket" if accept else "user_pointer_at_exit",
        direction="accept" if accept else "connect",
        family=_FAMILIES.get(family, f"af_{family}"),
        fd=fd,
        result=result,
        abstract=bool(abstract),
        address=peer,
        address_reason=reason,
        local_address=address_text(family, local) if ip else None,
        local_port=local_port if ip else None,
        port=port if ip and peer is not None else None,
        stack=stack,
    )


def _ssl_op(body: bytes, call: int, libraries: list[str]) -> SslOp:
    result, count, library, _ = SSL_OP_BODY.unpack_from(body)
    return SslOp(
        bytes=count,
        direction="read" if call in (11, 13) else "write",
        library=libraries[library] if library < len(libraries) else f"library:{library}",
        result=result,
    )


def _function_call(body: bytes, libraries: list[str]) -> FunctionCall:
    offset, count, first_ns, last_ns, library, length, id_bytes, frames, build_id, total = (
        FUNCTION_CALL_BODY.unpack_from(body)
    )
    at = FUNCTION_CALL_BODY.size
    raw = _cut(body, at, frames * STACK_FRAME.size)
    name = text(_cut(body, at + len(raw), length))
    stack = [_frame(*frame) for frame in STACK_FRAME.iter_unpack(raw) if frame[0]]
    counted = bool(last_ns)
    mangled = name.startswith(("_Z", "_R"))
    return FunctionCall(
        binary=libraries[library] if library < len(libraries) else f"library:{library}",
        offset=offset,
        symbol=name,
        build_id=_cut(build_id, 0, id_bytes).hex() or None,
        count=count if counted else None,
        first_ns=first_ns if counted else None,
        last_ns=last_ns if counted else None,
        stack=stack or None,
        symbol_mangled=name if mangled else None,
        symbol_reason="not_demangled" if mangled else None,
        symbol_truncated=total > length,
    )


def _throttle(body: bytes) -> Throttle:
    since_ns, until_ns, dropped, limit, scope, stop = THROTTLE_BODY.unpack_from(body)
    return Throttle(
        limit_per_second=limit,
        scope="cgroup" if scope else "node",
        since_ns=since_ns,
        state="stop" if stop else "start",
        dropped=dropped if stop else None,
        until_ns=until_ns if stop else None,
    )


def decode_event(kind: int, call: int, body: bytes, libraries: list[str]) -> Event:
    """Decode a record's body.  Raises `BrokenPromise` when it cannot be one."""
    if call >= len(CALL_TYPES) or kind != CALL_TYPES[call]:
        raise BrokenPromise(f"a record of type {kind} by call {call}")
    try:
        match kind:
            case 1:
                return _file_open(body)
            case 2:
                return _process_exec(body)
            case 3:
                return _tcp_state(body)
            case 4:
                return _net_connect(body, call)
            case 5:
                return _ssl_op(body, call, libraries)
            case 6:
                return _function_call(body, libraries)
            case 7:
                return _throttle(body)
    except (struct.error, ValueError, IndexError) as e:
        raise BrokenPromise(f"a record of type {kind}: {e}") from None
    raise BrokenPromise(f"a record of unknown type {kind}")
