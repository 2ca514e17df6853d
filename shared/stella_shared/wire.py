"""What crosses the bus: raw batches, heads of enriched parts, heartbeats.

    collector --RawBatch (MessagePack, array)--> enricher --lines + PartHead (JSON header)--> signer
    every service --Beat (JSON)--> gateway

A *run* is one life of the loaded BPF programs: numbers start at 0 in it.  A *lane* is one CPU and one kind
of program context (`lane = cpu * LANE_KINDS + kind`); within a lane the kernel hands out sequence numbers.
A number is *settled* once it is known to be recorded, filtered or lost.  Ledger rows count settled numbers,
so `next - first == recorded + filtered + lost` holds for each row of each batch, exactly, always.

Decoders tolerate unknown trailing fields, so that parts of different age can talk during an upgrade.
"""

from __future__ import annotations

import base64
import itertools
import zlib
from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise

#: Of heads of enriched messages, and of raw batches.
HEAD_VERSION: Final = 2
RAW_VERSION: Final = 2
LANE_KINDS: Final = 4
LANE_KIND_NAMES: Final = ("syscall", "exec", "sock", "uprobe")
#: The kind whose programs can be preempted, so that its numbers may come out of order.
UPROBE_KIND: Final = 3


class LaneRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One lane's share of a batch (or of a chunk): settled numbers `[first, next)` and what became of them."""

    lane: int
    first: int
    next: int
    recorded: int
    filtered: int
    lost: int


class Ledger(msgspec.Struct, frozen=True, array_like=True):
    """The accounting of one batch: deltas, never totals.

    `filtered` counts by cause: `kernel_*` causes are events that never took a number; `user_*` causes are
    numbers (they are the rows' `filtered`).  `lost` counts by cause: every cause except those in
    `UNNUMBERED_LOSSES` is numbers (the rows' `lost`).
    """

    start_ns: int
    end_ns: int
    lanes: list[LaneRow]
    filtered: dict[str, int]
    lost: dict[str, int]


#: Losses that never took a number: the kernel did not even run the program.
UNNUMBERED_LOSSES: Final = frozenset({"probe_missed"})
LOSS_CAUSES: Final = (
    "ring_full",
    "rate_limit",
    "inflight",
    "probe_missed",
    "bus",
    "enricher",
    "signer",
    "restart",
    "unclean_boot",
)
FILTER_CAUSES: Final = (
    "kernel_target",
    "kernel_path",
    "kernel_network",
    "user_path",
)


def ledger_faults(ledger: Ledger) -> list[str]:
    """Return, in words, each way in which `ledger` breaks the identity; an honest ledger returns []."""
    faults = [
        f"lane {row.lane}: {row.next - row.first} numbers, but "
        f"{row.recorded} recorded + {row.filtered} filtered + {row.lost} lost"
        for row in ledger.lanes
        if row.next - row.first != row.recorded + row.filtered + row.lost
        or min(row.first, row.recorded, row.filtered, row.lost) < 0
    ]
    numbered_filtered = sum(n for cause, n in ledger.filtered.items() if cause.startswith("user_"))
    numbered_lost = sum(n for cause, n in ledger.lost.items() if cause not in UNNUMBERED_LOSSES)
    for word, rows, causes in (
        ("filtered", sum(r.filtered for r in ledger.lanes), numbered_filtered),
        ("lost", sum(r.lost for r in ledger.lanes), numbered_lost),
    ):
        if rows != causes:
            faults.append(f"lanes say {rows} {word}, causes say {causes}")
    return faults


class Closing(msgspec.Struct, frozen=True, array_like=True):
    """The end of a run whose collector died before its final batch, told by the run that follows.

    `taken` are the numbers that each lane had handed out, `filtered` the kernel's totals by cause, both
    read from the counters that the dead run left pinned.  When `reason` is not empty the counters are
    gone with the kernel or the mount that held them: then nobody knows how many were lost, and it says why.
    """

    run: str
    boot_id: str
    taken: dict[int, int]
    filtered: dict[str, int]
    reason: str = ""


class Program(msgspec.Struct, frozen=True, array_like=True):
    """A program, as the kernel knew it when its first event happened.

    `path` is the kernel's own, from the root of the process's mount namespace; `device` and `inode` are those of
    the file.  `build_id` is read from the file itself, hex.  `reason` says what is missing and why.
    """

    path: str
    device: str = ""
    inode: int = 0
    build_id: str = ""
    reason: str = ""


#: Program keys that name no file (enum stella_program_key).
PROGRAM_NONE, PROGRAM_KERNEL, PROGRAM_UNKNOWN = 0, 1, 2
FORGOTTEN_PROGRAM: Final = Program("", reason="forgotten")


class RawBatch(msgspec.Struct, frozen=True, array_like=True):
    """One drain of the ring, as the collector publishes it.

    `records` is a batch as `events.unpack_batch` reads it.  `number` counts from 0 within `run` without a hole.
    `coverage` is the canonical JSON of the coverage document when it is new or due again, else empty.  `final`
    marks the last batch of a clean stop.  `closings` stand in a run's batch 0, one for each earlier run that
    ended without a final batch.  Arguments in `records` are as the kernel gave them, secrets and all.
    `cgroups` are the paths of the cgroups whose ids stand in `records`, `programs` what the program keys there
    mean: each batch says all of its own, so that any enricher may take it.
    """

    version: int
    node: str
    boot_id: str
    run: str
    number: int
    ledger: Ledger
    coverage: bytes
    final: bool
    closings: list[Closing]
    #: Paths of the libraries whose index the `ssl_op` records carry.
    libraries: list[str]
    records: bytes
    cgroups: dict[int, str] = {}
    programs: dict[int, Program] = {}


class PartHead(msgspec.Struct, frozen=True):
    """The head of one enriched message: which batch, which part of it, how many lines, what accounting.

    The parts of a batch are numbered `0 … parts-1`, one per event type present.  `ledger`, `coverage`
    and `closings` stand in part 0 alone.
    """

    version: int
    node: str
    boot_id: str
    run: str
    number: int
    part: int
    parts: int
    lines: int
    ledger: Ledger | None = None
    coverage: str = ""
    final: bool = False
    closings: list[Closing] = []
    #: CLOCK_BOOTTIME of the batch's first event, of its drain and of its enrichment (for latency).
    oldest_ns: int = 0
    drained_ns: int = 0
    enriched_ns: int = 0


class Histogram(msgspec.Struct):
    """Cumulative-free bucket counts: `counts[i]` values ≤ `bounds[i]`, the last count is the rest."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` `times` times."""
        for i, bound in enumerate(self.bounds):
            if value <= bound:
                self.counts[i] += times
                break
        else:
            self.counts[-1] += times
        self.total += value * times

    @classmethod
    def with_bounds(cls, *bounds: float) -> Histogram:
        """Return an empty histogram with these upper bounds (ascending)."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def quantile(self, q: float) -> float:
        """Return the upper bound of the bucket that holds quantile `q`; 0.0 when nothing was counted."""
        want = q * sum(self.counts)
        seen = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if seen and seen >= want:
                return bound
        return self.bounds[-1] if seen or self.counts[-1] else 0.0


class Beat(msgspec.Struct):
    """A service instance's heartbeat, once a second.

    `metrics` are counters and gauges by the names in `metrics.CATALOGUE` (a label set is written
    `name{key=value}`); `detail` is what `/status` shows of this service, JSON values only.
    """

    service: str
    instance: str
    node: str
    pid: int
    version: str
    at: float
    started_at: float
    state: str
    reason: str = ""
    metrics: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    detail: dict[str, object] = {}


#: `Beat.state` values; anything but `ok` makes `/health` say so.
BEAT_STATES: Final = ("starting", "ok", "degraded", "failed", "stopping")

#: What the decoders raise for hostile bytes: wrong types, text that is no UTF-8, nesting without end.
_REFUSALS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_raw_encoder = msgspec.msgpack.Encoder()
_raw_decoder = msgspec.msgpack.Decoder(RawBatch)
_head_encoder = msgspec.json.Encoder()
_head_decoder = msgspec.json.Decoder(PartHead)
_beat_decoder = msgspec.json.Decoder(Beat)


def encode_raw(batch: RawBatch) -> bytes:
    """Encode a raw batch as MessagePack."""
    return _raw_encoder.encode(batch)


def decode_raw(data: bytes) -> RawBatch:
    """Decode a raw batch.  Raises `BrokenPromise` naming what is wrong with it."""
    try:
        batch = _raw_decoder.decode(data)
    except _REFUSALS as e:
        raise BrokenPromise(f"raw batch of {len(data)} bytes: {e}") from None
    if batch.version != RAW_VERSION:
        raise BrokenPromise(f"raw batch speaks wire version {batch.version}, this is {RAW_VERSION}")
    return batch


#: A header of more than some 64 KiB is never acknowledged by JetStream.
HEAD_MAX_BYTES: Final = 60_000
_HEAD_PLAIN_BYTES: Final = 16_384
_HEAD_UNPACKED_MAX_BYTES: Final = 4 << 20
_PACKED: Final = "zlib:"


def encode_head(head: PartHead) -> str:
    """Encode a part head as one line for the header `subjects.HEAD_HEADER`: JSON, packed when it is long.

    Raises `BrokenPromise` when it is too long for a header even so.
    """
    plain = _head_encoder.encode(head)
    if len(plain) <= _HEAD_PLAIN_BYTES:
        return plain.decode()
    packed = _PACKED + base64.b64encode(zlib.compress(plain, 6)).decode()
    if len(packed) > HEAD_MAX_BYTES:
        raise BrokenPromise(f"the head of an enriched message has {len(packed)} bytes, over {HEAD_MAX_BYTES}")
    return packed


def _unpacked(text: str | bytes) -> str | bytes:
    if isinstance(text, bytes) or not text.startswith(_PACKED):
        return text
    unpack = zlib.decompressobj()
    plain = unpack.decompress(base64.b64decode(text[len(_PACKED) :], validate=True), _HEAD_UNPACKED_MAX_BYTES)
    if not unpack.eof:
        raise ValueError(f"it is cut short, or over {_HEAD_UNPACKED_MAX_BYTES} bytes")
    return plain


def decode_head(text: str | bytes) -> PartHead:
    """Decode a part head.  Raises `BrokenPromise` naming what is wrong with it."""
    try:
        head = _head_decoder.decode(_unpacked(text))
    except (*_REFUSALS, ValueError, zlib.error) as e:
        raise BrokenPromise(f"head of an enriched message: {e}") from None
    if head.version != HEAD_VERSION:
        raise BrokenPromise(f"enriched head speaks wire version {head.version}, this is {HEAD_VERSION}")
    return head


def encode_beat(beat: Beat) -> bytes:
    """Encode a heartbeat as JSON."""
    return _head_encoder.encode(beat)


def decode_beat(data: bytes) -> Beat:
    """Decode a heartbeat.  Raises `BrokenPromise` naming what is wrong with it."""
    try:
        beat = _beat_decoder.decode(data)
    except _REFUSALS as e:
        raise BrokenPromise(f"heartbeat: {e}") from None
    for name, histogram in beat.histograms.items():
        if not _makes_sense(histogram):
            raise BrokenPromise(f"heartbeat: {name!r} is no histogram")
    return beat


def _makes_sense(histogram: Histogram) -> bool:
    """Whether bounds ascend, each bucket and the rest have a count, and no count is negative."""
    bounds, counts = histogram.bounds, histogram.counts
    return (
        0 < len(bounds) == len(counts) - 1
        and all(a < b for a, b in itertools.pairwise(bounds))
        and all(0 <= count < 1 << 63 for count in counts)
    )
