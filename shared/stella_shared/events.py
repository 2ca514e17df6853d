"""Events: what an evidence line says, and its canonical bytes.

`pid` here is the kernel's tgid, the number users call pid; `tid` is the thread.  Bytes that are no UTF-8
(names may hold any byte but zero) are written as `\\xNN` escapes, so a line is always text.

One evidence line is one JSON object with sorted keys and no spaces (RFC 8785), ended by a newline.
Integers keep all their digits, beyond 2^53 too: see docs/decisions/0001-exact-integers.md.  Unknown is never
silent: a field that is missing where one would look for it has a `…_reason` beside it.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from stella_shared.errors import BrokenPromise

EVENT_TYPES: Final = ("file_open", "process_exec", "tcp_state", "net_connect", "ssl_op", "function_call", "throttle")

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
