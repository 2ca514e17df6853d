"""The kernel's records: how they are laid out (bpf/include/stella_record.h), and the events they become.

Bytes that are no UTF-8 (names may hold any byte but zero) become `\\xNN` escapes, so an event is always text.
What cannot be a record is a `BrokenPromise`; nothing else is ever raised.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final, Literal

from stella_shared.errors import BrokenPromise
from stella_shared.events import (
    Ancestor,
    Event,
    FileOpen,
    FunctionCall,
    NetConnect,
    ProcessExec,
    SslOp,
    StackFrame,
    TcpState,
    Throttle,
)

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
        return socket.inet_ntoa(raw[:4])
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
