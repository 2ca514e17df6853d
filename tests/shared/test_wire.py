"""What crosses the bus decodes to what was sent, or is a `BrokenPromise`."""

from __future__ import annotations

import base64
import secrets
import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_shared import subjects, wire
from stella_shared.errors import BrokenPromise
from stella_shared.wire import Beat, Closing, Histogram, LaneRow, Ledger, PartHead, RawBatch

NAT = st.integers(0, 2**63)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.builds(LaneRow, NAT, NAT, NAT, NAT, NAT, NAT)
COUNTS = st.dictionaries(TEXT, NAT, max_size=3)
LEDGERS = st.builds(Ledger, NAT, NAT, st.lists(ROWS, max_size=3), COUNTS, COUNTS)
CLOSINGS = st.lists(st.builds(Closing, TEXT, TEXT, st.dictionaries(NAT, NAT, max_size=3), COUNTS, TEXT), max_size=2)
BATCHES = st.builds(
    RawBatch, version=st.just(wire.RAW_VERSION), node=TEXT, boot_id=TEXT, run=TEXT, number=NAT, ledger=LEDGERS,
    coverage=st.binary(max_size=20), final=st.booleans(), closings=CLOSINGS, libraries=st.lists(TEXT, max_size=3),
    records=st.binary(max_size=60),
)  # fmt: skip
HEADS = st.builds(
    PartHead, version=st.just(wire.HEAD_VERSION), node=TEXT, boot_id=TEXT, run=TEXT, number=NAT, part=NAT, parts=NAT,
    lines=NAT, ledger=st.one_of(st.none(), LEDGERS), coverage=TEXT, final=st.booleans(), closings=CLOSINGS,
    drained_ns=NAT, enriched_ns=NAT,
)  # fmt: skip


@given(batch=BATCHES, head=HEADS)
def test_what_was_sent_is_what_arrives(batch: RawBatch, head: PartHead) -> None:
    """Batches and heads come back equal; a head is one line of text, as a header must be."""
    assert batch == wire.decode_raw(wire.encode_raw(batch))
    text = wire.encode_head(head)
    assert head == wire.decode_head(text)
    assert "\n" not in text
    assert "\r" not in text


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), batch=BATCHES, at=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_bytes_decode_or_are_a_broken_promise(data: bytes, batch: RawBatch, at: int, byte: int) -> None:
    """Arbitrary and changed bytes raise nothing else, in all three decoders."""
    changed = bytearray(wire.encode_raw(batch))
    changed[at % len(changed)] = byte
    for hostile in (data, bytes(changed), bytes(changed[: at % len(changed)])):
        for decode in (wire.decode_raw, wire.decode_head, wire.decode_beat):
            try:
                decode(hostile)
            except BrokenPromise:
                continue


def test_endless_nesting_is_a_broken_promise() -> None:
    """A message that nests without end costs no more than its bytes."""
    fields = list(msgspec.to_builtins(RawBatch(1, "n", "b", "r", 0, Ledger(0, 0, [], {}, {}), b"", False, [], [], b"")))
    fields[6] = fields[-1] = b""
    deep = b"\x9c" + b"".join(map(msgspec.msgpack.encode, fields)) + b"\x91" * 1_000_000
    with pytest.raises(BrokenPromise):
        wire.decode_raw(deep)
    for decode in (wire.decode_head, wire.decode_beat):
        with pytest.raises(BrokenPromise):
            decode(b'{"x":' + b"[" * 1_000_000)


def test_a_newer_part_may_say_more_but_not_speak_another_version() -> None:
    """Unknown trailing fields are passed over; another wire version is refused by name."""
    batch = RawBatch(wire.RAW_VERSION, "n", "b", "r", 0, Ledger(0, 0, [], {}, {}), b"", False, [], [], b"")
    fields = list(msgspec.to_builtins(batch))
    fields[10] = b""
    fields[6] = b""
    assert batch == wire.decode_raw(msgspec.msgpack.encode(fields[:11]))
    assert batch == wire.decode_raw(msgspec.msgpack.encode([*fields, "news", 1]))
    with pytest.raises(BrokenPromise, match="wire version 7"):
        wire.decode_raw(msgspec.msgpack.encode([7, *fields[1:]]))
    head = PartHead(wire.HEAD_VERSION, "n", "b", "r", 0, 0, 1, 0)
    assert head == wire.decode_head(msgspec.json.encode({**msgspec.to_builtins(head), "news": []}))
    with pytest.raises(BrokenPromise, match="wire version 7"):
        wire.decode_head(msgspec.json.encode({**msgspec.to_builtins(head), "version": 7}))


def test_ledger_faults_finds_each_way_to_cheat() -> None:
    """A number missing, one too many, a negative count, and causes that do not add up are each named."""
    honest = LaneRow(0, 10, 20, 5, 2, 3)
    filtered, lost = {"user_path": 2, "kernel_path": 99}, {"ring_full": 3, "probe_missed": 7}
    assert [] == wire.ledger_faults(Ledger(0, 1, [honest], filtered, lost))
    for row in (
        LaneRow(0, 10, 21, 5, 2, 3), LaneRow(0, 11, 20, 5, 2, 3), LaneRow(0, 10, 20, 6, 2, 3),
        LaneRow(0, 10, 20, 12, -5, 3), LaneRow(0, -10, 0, 5, 2, 3),
    ):  # fmt: skip
        assert wire.ledger_faults(Ledger(0, 1, [row], filtered, lost)), row
    assert wire.ledger_faults(Ledger(0, 1, [honest], {"kernel_path": 2}, lost))
    assert wire.ledger_faults(Ledger(0, 1, [honest], filtered, {"probe_missed": 3}))
    assert wire.ledger_faults(Ledger(0, 1, [], {}, {"bus": 1}))


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_a_quantile_is_never_below_the_truth(values: list[float]) -> None:
    """The quantile is the upper bound of the value's bucket, for all that lies within the bounds."""
    histogram = Histogram.with_bounds(1, 2, 5, 10)
    for value in values:
        histogram.observe(value)
    assert len(values) == sum(histogram.counts)
    for q in (0.5, 0.99, 1.0):
        truth = sorted(values)[max(0, -(-int(q * 100) * len(values) // 100) - 1)]
        assert histogram.quantile(q) >= truth
    assert 0.0 == Histogram.with_bounds(1).quantile(0.5)


def test_beats_come_back() -> None:
    """A heartbeat with histogram and detail survives the wire."""
    beat = Beat(
        "s", "i", "n", 1, "v", 1.0, 0.5, "ok", metrics={"a{b=c}": 1.0}, histograms={"h": Histogram.with_bounds(1)}
    )
    assert beat == wire.decode_beat(wire.encode_beat(beat))


@given(name=TEXT)
def test_any_node_name_is_one_token(name: str) -> None:
    """A node called anything leads to one subject that its streams cover, and to no other's."""
    subject = subjects.raw(name)
    assert 3 == len(subject.split("."))
    assert not set(subject) & set(" *>\r\n\t\0")


def test_a_long_head_is_packed_and_comes_back() -> None:
    """A head that would not fit into a header travels packed; one that no packing helps is refused by name."""
    ledger = wire.Ledger(0, 1, [], {}, {})
    head = wire.PartHead(
        wire.HEAD_VERSION, "n", "b", "r", 0, 0, 1, 0, ledger, coverage='{"filters":' + '["/some/folder/**"]' * 20_000
    )
    packed = wire.encode_head(head)
    assert len(packed) < wire.HEAD_MAX_BYTES
    assert "\n" not in packed
    assert head == wire.decode_head(packed)
    random = wire.PartHead(wire.HEAD_VERSION, "n", "b", "r", 0, 0, 1, 0, ledger, coverage=secrets.token_hex(100_000))
    with pytest.raises(BrokenPromise, match="over 60000"):
        wire.encode_head(random)


@pytest.mark.parametrize(
    "text",
    [
        "zlib:",
        "zlib:!!",
        "zlib:" + base64.b64encode(b"no zlib").decode(),
        "zlib:" + base64.b64encode(zlib.compress(b"x" * 100_000_000)).decode(),
        "zlib:" + base64.b64encode(zlib.compress(b"{}")[:-3]).decode(),
    ],
)
def test_a_packed_head_that_cannot_be_one_is_refused(text: str) -> None:
    """Nonsense, bombs and cut ends are a broken promise, at a bounded cost."""
    with pytest.raises(BrokenPromise):
        wire.decode_head(text)
