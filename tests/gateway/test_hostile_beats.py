"""Heartbeats are hostile until proven otherwise: whoever takes a part over sends what it likes as that part."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_gateway import exposition
from stella_gateway.board import Board
from stella_shared.errors import BrokenPromise
from stella_shared.wire import decode_beat

KEYS = (
    "probes", "chain_id", "index", "last_statement_sha256", "open_lines", "open_bytes", "key_hint", "signing", "lost",
    "filtered", "names", "caches", "binaries", "privileges", "io_uring", "config", "targets", "records", "containers",
)  # fmt: skip
METRICS = (
    "stellaops_signals_events_rate", "stellaops_signals_ringbuf_usage",
    "stellaops_signals_events_total{type=file_open}",
    "stellaops_signals_drops_total{cause=ring_full}", "stellaops_signals_drops_total{cause=\"}\n", "x{", "{}", "",
    "stellaops_signals_probe_attached{probe=a,b=c}", "stellaops_signals_chunks_signed",
)  # fmt: skip
HISTOGRAMS = ("stellaops_signals_enrich_latency_seconds", "stellaops_signals_durable_latency_seconds", "x")
numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**63), st.just(0))
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
histogram = st.fixed_dictionaries(
    {"bounds": st.lists(numbers, max_size=4), "counts": st.lists(st.integers(-5, 2**40), max_size=5)},
    optional={"sum": numbers, "total": numbers, "count": st.integers(-5, 2**40)},
)
beats = st.fixed_dictionaries(
    {
        "service": st.sampled_from(["collector", "enricher", "signer", "gateway", "", "else\n"]),
        "instance": st.sampled_from(["n", "n-1", '\x00"}', ""]),
        "node": st.just("n"),
        "pid": st.integers(-1, 2**31),
        "version": st.text(max_size=4),
        "at": numbers,
        "started_at": numbers,
        "state": st.sampled_from(["ok", "degraded", "failed", "starting", "stopping", "odd", ""]),
        "reason": st.text(max_size=10),
        "metrics": st.dictionaries(st.sampled_from(METRICS) | st.text(max_size=6), numbers, max_size=4),
        "histograms": st.dictionaries(st.sampled_from(HISTOGRAMS), histogram, max_size=2),
        "detail": st.dictionaries(st.sampled_from(KEYS), anything, max_size=4),
    }
)


@settings(max_examples=400, deadline=None)
@given(st.lists(beats, min_size=1, max_size=3))
def test_whatever_a_heartbeat_says_every_page_can_be_made(documents: list[object]) -> None:
    """Health, status and exposition answer, and hold no line that a heartbeat has put into the exposition."""
    board = Board("n", {"collector": 1, "enricher": 1, "signer": 1}, 0.0)
    for at, document in enumerate(documents):
        try:
            beat = decode_beat(msgspec.json.encode(document))
        except BrokenPromise:
            continue
        board.hear(beat, float(at))
        board.tick(float(at))
    now = float(len(documents))
    msgspec.json.encode(board.health(now))
    msgspec.json.encode(board.status(now))
    for line in exposition.render(board, now).decode().splitlines():
        assert line.startswith(("# ", "stellaops_signals_")), line
