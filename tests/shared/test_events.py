"""Events: whatever the bytes, decoding gives an event or `BrokenPromise`; what it gives says what was there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_shared import events, kernel_records, raw_batches
from stella_shared.errors import BrokenPromise
from tests.enricher.record_maker import ANYTHING, FRAMES, NAMES, file_open, net_connect, process_exec, record


@settings(max_examples=400, deadline=None)
@given(kind=st.integers(0, 7), call=st.one_of(st.integers(0, 15), st.integers(0, 65535)), body=st.binary(max_size=300))
def test_a_body_of_any_bytes_is_an_event_or_a_broken_promise(kind: int, call: int, body: bytes) -> None:
    """No other exception leaves `decode_event`."""
    try:
        event = kernel_records.decode_event(kind, call, body, ["/lib/libssl.so.3"])
    except BrokenPromise:
        return
    assert kernel_records.TYPE_NAMES[kind] == type(event).__struct_config__.tag


@settings(max_examples=300, deadline=None)
@given(what=ANYTHING, cut=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_cut_or_changed_body_is_an_event_or_a_broken_promise(
    what: tuple[int, int, bytes], cut: int, byte: int
) -> None:
    """Lengths inside a body that lie lead nowhere."""
    kind, call, body = what
    changed = bytearray(body)
    changed[cut % len(body)] = byte
    for hostile in (bytes(changed), body[:cut]):
        try:
            kernel_records.decode_event(kind, call, hostile, [])
        except BrokenPromise:
            continue


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=300),
    whats=st.lists(ANYTHING, max_size=3),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=2),
    cut=st.one_of(st.just(10**6), st.integers(0, 600)),
)
def test_a_batch_of_any_bytes_is_records_or_a_broken_promise(
    data: bytes, whats: list[tuple[int, int, bytes]], changes: list[tuple[int, int]], cut: int
) -> None:
    """Arbitrary, changed and cut batches are taken apart or refused; the quick looks at them raise nothing."""
    packed = bytearray(raw_batches.pack_batch(record(*what) for what in whats))
    for at, byte in changes:
        if at < len(packed):
            packed[at] = byte
    for hostile in (data, bytes(packed[:cut])):
        raw_batches.names(hostile)
        raw_batches.oldest_ns(hostile)
        try:
            found = list(raw_batches.records(hostile))
        except BrokenPromise:
            continue
        assert not hostile or len(found) == raw_batches.BATCH_COUNTS.unpack_from(hostile)[2]


@given(
    whats=st.lists(ANYTHING, min_size=1, max_size=4),
    order=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30),
)
def test_a_batch_says_each_distinct_thing_once(
    whats: list[tuple[int, int, bytes]], order: list[tuple[int, int]]
) -> None:
    """Records come back in their order and whole; who and what are said once however often they come."""
    raw = []
    for seq, (what, who) in enumerate(order):
        kind, call, body = whats[what % len(whats)]
        raw.append(
            record(
                kind,
                call,
                body,
                seq=seq,
                ts=7 * seq,
                cgroup=who,
                start_ns=who + 3,
                program=who + 4,
                tgid=who + 1,
                tid=who + 2,
                uid=3,
                lane=who,
            )
        )  # fmt: skip
    packed = raw_batches.pack_batch(raw)
    found = list(raw_batches.records(packed))
    assert [(7 * i, i, who, who + 1, who + 2, who) for i, (_, who) in enumerate(order)] == [
        (r.ts_ns, r.seq, r.cgroup_id, r.tgid, r.tid, r.lane) for r in found
    ]
    for r, (what, _) in zip(found, order, strict=True):
        kind, call, body = whats[what % len(whats)]
        assert (kind, call, body) == (r.type, r.call, r.body[: len(body)])
        assert not any(r.body[len(body) :])
    taken_apart = raw_batches.unpack_batch(packed)
    assert len(set(taken_apart.whats)) == len(taken_apart.whats) <= len(whats)
    assert len(set(taken_apart.whos)) == len(taken_apart.whos)
    names = raw_batches.names(packed)
    assert {who for _, who in order} == names.cgroups
    assert {who + 4: (who + 1, who + 3) for _, who in order} == names.programs
    assert 0 == raw_batches.oldest_ns(packed)


@settings(max_examples=200, deadline=None)
@given(what=ANYTHING, seq=st.integers(0, 2**64 - 1))
def test_a_record_decodes_to_what_was_packed(what: tuple[int, int, bytes], seq: int) -> None:
    """Header fields come back, and padding changes no event."""
    kind, call, body = what
    raw = record(
        kind, call, body, seq=seq, lane=3, comm=b"a b", ts=9, cgroup=8, start_ns=11, program=12, tgid=7, tid=6, uid=5
    )
    (r,) = raw_batches.records(raw_batches.pack_batch([raw]))
    assert (9, seq, 8, 11, 12, 7, 6, 5, 3, kind, call, b"a b") == (
        r.ts_ns, r.seq, r.cgroup_id, r.start_ns, r.program, r.tgid, r.tid, r.uid, r.lane, r.type, r.call, r.comm,
    )  # fmt: skip
    assert kernel_records.decode_event(kind, call, body, []) == kernel_records.decode_event(kind, call, r.body, [])


@given(path=NAMES, result=st.integers(-4095, 1 << 20), flags=st.integers(0, 0o17777777))
def test_file_open_says_path_outcome_and_access(path: bytes, result: int, flags: int) -> None:
    """The path is the caller's bytes, `result` the kernel's answer; access comes from the flags."""
    event = kernel_records.decode_event(1, 1, file_open(path, result=result, flags=flags), [])
    assert isinstance(event, events.FileOpen)
    assert (path.decode("utf-8", "backslashreplace"), result, flags) == (event.path, event.result, event.flags)
    assert (event.access == "path") == bool(flags & 0o10000000)
    if event.access != "path":
        assert ("read", "write", "read_write", "read_write")[flags & 3] == event.access
    assert (None if path.startswith(b"/") else -100) == event.dfd


@given(words=st.lists(NAMES, max_size=5), name=NAMES, interpreter=NAMES, cut=st.integers(0, 400))
def test_process_exec_gives_the_words_back(words: list[bytes], name: bytes, interpreter: bytes, cut: int) -> None:
    """argv is split at its zeros, empty words included; a cut last word stays as far as it goes."""
    argv = b"".join(word + b"\0" for word in words)
    event = kernel_records.decode_event(2, 3, process_exec(name, interpreter, argv), [])
    assert isinstance(event, events.ProcessExec)
    assert [kernel_records.text(word) for word in words] == event.argv
    assert (kernel_records.text(name), kernel_records.text(interpreter) or None) == (event.filename, event.interpreter)
    part = kernel_records.decode_event(2, 3, process_exec(name, b"", argv[:cut], argv_status=1), [])
    assert isinstance(part, events.ProcessExec)
    assert part.argv_truncated
    whole = b"\0".join(w for w in argv[:cut].split(b"\0")).removesuffix(b"\0")
    assert kernel_records.text(whole).split("\0") == (part.argv or [""])


@given(
    frames=FRAMES,
    abstract=st.booleans(),
    name=st.binary(min_size=1, max_size=107).map(lambda b: b.replace(b"\0", b"a")),
)
def test_net_connect_names_unix_sockets_and_frames(
    frames: list[tuple[int, bytes, int]], abstract: bool, name: bytes
) -> None:
    """An abstract name begins with @; a frame is build-id and offset, or `addr:0x…`; empty frames are left out."""
    path = b"\0" + name if abstract else name + b"\0"
    body = net_connect(
        8, path, frames, result=0, fd=3, family=1, port=0, local_port=0, status=0, abstract=abstract,
        address=bytes(16), local=bytes(16),
    )  # fmt: skip
    event = kernel_records.decode_event(4, 8, body, [])
    assert isinstance(event, events.NetConnect)
    assert ("@" if abstract else "") + kernel_records.text(name) == event.address
    expected = [
        events.StackFrame(build_id=build_id.hex(), offset=offset)
        if status == 1
        else events.StackFrame(symbol=f"addr:0x{offset:x}")
        for status, build_id, offset in frames
        if status
    ]
    assert expected == event.stack


def test_an_unknown_always_has_a_reason() -> None:
    """No path, no address, no argv: each says why."""
    opened = kernel_records.decode_event(1, 1, file_open(b"", status=2), [])
    assert isinstance(opened, events.FileOpen)
    assert (None, "the address could not be read") == (opened.path, opened.path_reason)
    ran = kernel_records.decode_event(2, 3, process_exec(b"/x", b"", b"", argv_status=2, total=9), [])
    assert isinstance(ran, events.ProcessExec)
    assert ([], "the address could not be read", 9) == (ran.argv, ran.argv_reason, ran.argv_bytes)
    for call, family, status, result, reason in (
        (5, 2, 2, -14, "the address could not be read"),
        (7, 1, 3, 4, "the socket has no name"),
        (7, 2, 3, -11, "no connection was taken"),
        (5, 16, 0, 0, "an address of this family is not decoded"),
    ):
        body = net_connect(
            call, b"", [], result=result, fd=3, family=family, port=1, local_port=1, status=status, abstract=0,
            address=bytes(16), local=bytes(16),
        )  # fmt: skip
        event = kernel_records.decode_event(4, call, body, [])
        assert isinstance(event, events.NetConnect)
        assert (None, reason, None) == (event.address, event.address_reason, event.port)


def test_a_library_index_beyond_the_list_is_named() -> None:
    """A library the batch does not name stays tellable."""
    event = kernel_records.decode_event(5, 11, kernel_records.SSL_OP_BODY.pack(1, 1, 7, 0), ["/a"])
    assert isinstance(event, events.SslOp)
    assert "library:7" == event.library


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"boot_id":1}',
        "\x00",
        b'{"boot_id":"\xff"}',
        '{"x":' + "[" * 100_000,
        '{"event":{"type":"nothing"}}',
        "{" * 2000,
    ],
)
def test_a_line_that_is_none_is_a_broken_promise(text: str | bytes) -> None:
    """`decode_line` names what is wrong and raises nothing else."""
    with pytest.raises(BrokenPromise):
        events.decode_line(text)


def function_call(
    symbol: bytes, *, total: int = 0, counted: bool = False, stack: bytes = b"", build_id: int = 20
) -> bytes:
    """Return the body of a function_call record."""
    times = (5, 100, 200) if counted else (1, 0, 0)
    frames = len(stack) // kernel_records.STACK_FRAME.size
    head = kernel_records.FUNCTION_CALL_BODY.pack(
        4096, *times, 0, len(symbol), build_id, frames, b"\xab" * build_id, total or len(symbol)
    )
    return head + stack + symbol


def test_a_traced_call_has_its_stack() -> None:
    """The frames stand before the symbol; nothing is said of a count."""
    stack = kernel_records.STACK_FRAME.pack(1, b"\xab" * 20, 4096) + kernel_records.STACK_FRAME.pack(
        2, bytes(20), 0x7F00
    )
    event = kernel_records.decode_event(6, 15, function_call(b"main", stack=stack), ["/bin/x"])
    assert event == events.FunctionCall(
        binary="/bin/x",
        build_id="ab" * 20,
        offset=4096,
        stack=[events.StackFrame(build_id="ab" * 20, offset=4096), events.StackFrame(symbol="addr:0x7f00")],
        symbol="main",
    )


def test_a_counted_call_has_its_times() -> None:
    """Count, first and last; a file without a build-id has none."""
    event = kernel_records.decode_event(6, 15, function_call(b"main", counted=True, build_id=0), [])
    assert event == events.FunctionCall(
        binary="library:0", count=5, first_ns=100, last_ns=200, offset=4096, symbol="main"
    )


def test_a_mangled_name_is_told_apart() -> None:
    """It stands in `symbol_mangled`, with the reason why `symbol` is the same, and whether it was cut."""
    event = kernel_records.decode_event(6, 15, function_call(b"_Z1av", total=900), ["/bin/x"])
    assert isinstance(event, events.FunctionCall)
    assert ("_Z1av", "_Z1av", "not_demangled", True) == (
        event.symbol, event.symbol_mangled, event.symbol_reason, event.symbol_truncated,
    )  # fmt: skip


@pytest.mark.parametrize("cut", [1, 4, 40, 70])
def test_a_cut_call_is_refused(cut: int) -> None:
    """A symbol or a stack that runs over the end of the record is a broken promise."""
    stack = kernel_records.STACK_FRAME.pack(1, b"\xab" * 20, 4096)
    with pytest.raises(BrokenPromise):
        kernel_records.decode_event(6, 15, function_call(b"main", stack=stack)[:-cut], ["/bin/x"])
