"""Makes kernel records, honest and weird ones, for the tests of everything that reads them."""

from __future__ import annotations

from hypothesis import strategies as st

from stella_shared import kernel_records, raw_batches
from stella_shared.wire import RAW_VERSION, LaneRow, Ledger, Program, RawBatch

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
S32 = st.integers(-(2**31), 2**31 - 1)
S64 = st.integers(-(2**63), 2**63 - 1)
#: Bytes a name may hold, with those that JSON, UTF-8 and line readers stumble over.
NAMES = st.one_of(
    st.binary(max_size=60).map(lambda b: b.replace(b"\0", b"/")),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20).map(str.encode),
    st.sampled_from(
        [
            b"",
            b"/etc/passwd",
            b'/tmp/"quoted"\\',
            b"/tmp/\x01\x08\t\n\x0c\r\x1f\x7f",
            "/tmp/\u2028\u2029\ufeff".encode(),
            b"/tmp/\xff\xfe\xc3",
            b"/tmp/\xed\xa0\x80",
            "/tmp/\U0001f980".encode(),
            b"/proc/self/maps",
            b"/a/../etc/x",
            b"//etc//shadow",
        ]
    ),
)
COMMS = st.one_of(NAMES.map(lambda b: b[:16]), st.just(b"\xff" * 16))
ADDRESSES = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.just(b"\x7f\0\0\1" + b"\0" * 12),
    st.just(b"\0" * 10 + b"\xff\xff\x7f\0\0\1"),
)
FAMILIES = st.one_of(st.sampled_from([1, 2, 10]), U16)


def record(
    kind: int,
    call: int,
    body: bytes,
    *,
    seq: int = 0,
    lane: int = 0,
    comm: bytes = b"cat",
    ts: int = 1,
    cgroup: int = 1,
    start_ns: int = 9,
    program: int = 77,
    tgid: int = 5,
    tid: int = 6,
    uid: int = 0,
) -> bytes:
    """Return one record as it stands in a batch."""
    padded = body + b"\0" * (-len(body) % 8)
    size = kernel_records.RECORD_HEADER.size + len(padded)
    who = (cgroup, start_ns, program, tgid, tid, uid, lane)
    return kernel_records.RECORD_HEADER.pack(ts, seq, *who, kind, call, size, comm) + padded


def file_open(
    path: bytes,
    *,
    result: int = 3,
    flags: int = 0,
    resolve: int = 0,
    mode: int = 0,
    dfd: int = -100,
    status: int = 0,
    walked: int = 0,
    walked_path: bytes = b"",
    walked_flags: int = 0,
    inode: int = 0,
    device: int = 0,
    frames: tuple[tuple[int, bytes, int], ...] = (),
) -> bytes:
    """Return the body of a file_open; `walked` says what `walked_path` is (enum stella_walked)."""
    return (
        kernel_records.FILE_OPEN_BODY.pack(
            result, flags, resolve, inode, mode, dfd, device, len(path), len(walked_path), status, walked,
            walked_flags, len(frames), 0,
        )
        + path + walked_path + b"".join(kernel_records.STACK_FRAME.pack(*frame) for frame in frames)
    )  # fmt: skip


def process_exec(
    filename: bytes,
    interpreter: bytes,
    argv: bytes,
    *,
    name_status: int = 0,
    argv_status: int = 0,
    total: int = 0,
    inode: int = 0,
    device: int = 0,
    directory: bytes = b"",
    directory_flags: int = 0,
    ancestors: tuple[tuple[int, int, bytes], ...] = ((1, 2, b"init"),),
    frames: tuple[tuple[int, bytes, int], ...] = (),
) -> bytes:
    """Return the body of a process_exec; `ancestors` are (pid, start_ns, comm)."""
    rows = [kernel_records.ANCESTOR.pack(start_ns, pid, 0, comm) for pid, start_ns, comm in ancestors]
    return (
        kernel_records.PROCESS_EXEC_BODY.pack(
            inode, device, total, len(filename), len(interpreter), len(argv), len(directory), name_status,
            argv_status, directory_flags, len(rows), len(frames),
        )
        + b"".join(rows).ljust(kernel_records.ANCESTORS_MAX * kernel_records.ANCESTOR.size, b"\0")
        + filename + interpreter + argv + directory
        + b"".join(kernel_records.STACK_FRAME.pack(*frame) for frame in frames)
    )  # fmt: skip


def net_connect(
    call: int,
    path: bytes,
    frames: list[tuple[int, bytes, int]],
    *,
    result: int,
    fd: int,
    family: int,
    port: int,
    local_port: int,
    status: int,
    abstract: int,
    address: bytes,
    local: bytes,
) -> bytes:
    """Return the body of a net_connect; those of uprobes have room for a path and frames behind it."""
    fixed = kernel_records.NET_CONNECT_BODY.pack(
        result, fd, family, port, local_port, len(path), status, abstract, len(frames), 0, address, local
    )
    room = path if call < 8 else path.ljust(kernel_records.NET_PATH_BYTES, b"\0")
    return fixed + room + b"".join(kernel_records.STACK_FRAME.pack(*f) for f in frames)


FRAMES = st.lists(st.tuples(st.integers(0, 2), st.binary(min_size=20, max_size=20), U64), max_size=8)
OPENS = st.tuples(
    st.just(kernel_records.FILE_OPEN),
    st.integers(0, 2),
    st.builds(
        file_open, NAMES, result=S64, flags=st.one_of(st.integers(0, 0o17777777), U64),
        resolve=st.one_of(st.just(0), U64), mode=U32, dfd=st.one_of(st.just(-100), S32), status=st.integers(0, 3),
        walked=st.integers(0, 3), walked_path=NAMES, walked_flags=st.integers(0, 7), inode=U64, device=U32,
        frames=FRAMES.map(tuple),
    ),
)  # fmt: skip
#: Words that hold a secret, say that the next one is it, or look so.
TELLING = st.sampled_from(
    [b"--password=hunter2", b"--token", b"hunter2", b"PGPASSWORD=hunter2", b"mysql", b"-phunter2",
     b"--password=\xff\xfe", b"https://u:hunter2@h/", b"sh", b"-c", b"app --secret hunter2",
     b"--password-file=/run/x", b"--api-key=\"\n\x01"]
)  # fmt: skip
ARGV = st.lists(st.one_of(NAMES, TELLING), max_size=6).map(lambda words: b"".join(word + b"\0" for word in words))
EXECS = st.tuples(
    st.just(kernel_records.PROCESS_EXEC),
    st.just(3),
    st.builds(
        process_exec, NAMES, st.one_of(st.just(b""), NAMES), ARGV,
        name_status=st.integers(0, 2), argv_status=st.integers(0, 2), total=U32, inode=U64, device=U32,
        directory=NAMES, directory_flags=st.integers(0, 7), frames=FRAMES.map(tuple),
        ancestors=st.lists(st.tuples(U32, U64, NAMES.map(lambda b: b[:16])), max_size=6).map(tuple),
    ),
)  # fmt: skip
STATES = st.tuples(
    st.just(kernel_records.TCP_STATE),
    st.just(4),
    st.builds(
        kernel_records.TCP_STATE_BODY.pack, FAMILIES, U16, U16, st.integers(0, 15), st.integers(0, 15), ADDRESSES,
        ADDRESSES, st.integers(0, 2), st.just(0),
    ),
)  # fmt: skip
CONNECTS = st.integers(5, 10).flatmap(
    lambda call: st.tuples(
        st.just(kernel_records.NET_CONNECT),
        st.just(call),
        st.builds(
            net_connect,
            st.just(call),
            NAMES.map(lambda b: b[:108]),
            FRAMES,
            result=S64,
            fd=S32,
            family=FAMILIES,
            port=U16,
            local_port=U16,
            status=st.integers(0, 3),
            abstract=st.integers(0, 1),
            address=ADDRESSES,
            local=ADDRESSES,
        ),
    )
)
TLS = st.tuples(
    st.just(kernel_records.SSL_OP),
    st.integers(11, 14),
    st.builds(kernel_records.SSL_OP_BODY.pack, S64, U64, st.integers(0, 3), st.just(0)),
)
THROTTLES = st.tuples(
    st.just(kernel_records.THROTTLE),
    st.just(16),
    st.builds(kernel_records.THROTTLE_BODY.pack, U64, U64, U64, U64, st.integers(0, 1), st.integers(0, 1)),
)


def function_call(symbol: bytes, frames: list[tuple[int, bytes, int]], **fields: int) -> bytes:
    """Return the body of a function_call."""
    get = fields.get
    fixed = kernel_records.FUNCTION_CALL_BODY.pack(
        get("offset", 0), get("count", 1), get("first_ns", 0), get("last_ns", 0), get("library", 0), len(symbol),
        get("id_bytes", 20), len(frames), b"\xab" * 20, len(symbol) + get("cut", 0),
    )  # fmt: skip
    return fixed + b"".join(kernel_records.STACK_FRAME.pack(*frame) for frame in frames) + symbol


FUNCTIONS = st.tuples(
    st.just(kernel_records.FUNCTION_CALL),
    st.just(15),
    st.builds(
        function_call, NAMES, FRAMES, offset=U64, count=st.integers(1, 2**64 - 1), first_ns=U64, last_ns=U64,
        library=st.integers(0, 3), id_bytes=st.integers(0, 20), cut=st.integers(0, 9),
    ),
)  # fmt: skip
#: (type, call, body) of anything the kernel side may send.
ANYTHING = st.one_of(OPENS, EXECS, STATES, CONNECTS, TLS, FUNCTIONS, THROTTLES)


def split(data: bytes) -> list[bytes]:
    """Return the records that stand back to back in `data`."""
    out = []
    while data:
        size = kernel_records.RECORD_HEADER.unpack_from(data)[11]
        out.append(data[:size])
        data = data[size:]
    return out


def batch(
    data: bytes,
    lanes: dict[int, int],
    *,
    node: str = "n",
    run: str = "0" * 16,
    boot_id: str = "b" * 32,
    libraries: list[str] | None = None,
    packed: bytes | None = None,
    cgroups: dict[int, str] | None = None,
    programs: dict[int, Program] | None = None,
) -> RawBatch:
    """Return a batch of these records (or of these packed bytes), whose ledger says so."""
    rows = [LaneRow(lane, 0, n, n, 0, 0) for lane, n in sorted(lanes.items()) if n]
    return RawBatch(
        version=RAW_VERSION, node=node, boot_id=boot_id, run=run, number=0, ledger=Ledger(0, 1, rows, {}, {}),
        coverage=b"", final=False, closings=[], libraries=libraries or [],
        records=raw_batches.pack_batch(split(data)) if packed is None else packed, cgroups=cgroups or {},
        programs=programs or {},
    )  # fmt: skip
