"""The collector's share of the identity: from counters and drains to one ledger a batch.  Pure.

Two sources speak about the same numbers.  The ring shows which numbers arrived; the kernel's lanes show how
many were handed out and how many it knows to be lost.  A number is *settled* when its fate is known.

*Strict* lanes (everything but uprobes) have one writer at a time, so numbers come through the ring in order
and a skipped number is lost, at once.  Losses behind the last record show as no gap yet; they are settled
when the ring is empty and the kernel's count of losses explains every number between the last record and
the lane's counter.

The *uprobe* lane can be preempted inside a program, so a smaller number may follow a larger one.  There the
kernel's own count of losses is what settles them; gaps say nothing.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.wire import LANE_KINDS, UPROBE_KIND, LaneRow, Ledger

LANE_STRIDE: Final = 128
#: Kernel counters of numbers that were lost, in the order of `struct stella_lane` behind `taken`.
NUMBERED_CAUSES: Final = ("ring_full", "rate_limit", "inflight")
KERNEL_FILTERS: Final = ("kernel_target", "kernel_path", "kernel_network")

_COUNTERS = struct.Struct("<7Q")
_SEEN = struct.Struct("<4Q")
#: Bytes of a lane in `Accountant.state` and in a reader's `seen`.
STATE_BYTES: Final = 64
SEEN_BYTES: Final = _SEEN.size


class LaneCounters(msgspec.Struct, frozen=True, gc=False):
    """The kernel's counters of one lane, as totals since the programs were loaded."""

    taken: int
    lost: tuple[int, int, int]
    filtered: tuple[int, int, int]


def decode_counters(data: bytes) -> list[LaneCounters]:
    """Decode the lanes map: one row of 128 bytes a lane."""
    out = []
    for at in range(0, len(data), LANE_STRIDE):
        taken, l0, l1, l2, f0, f1, f2 = _COUNTERS.unpack_from(data, at)
        out.append(LaneCounters(taken, (l0, l1, l2), (f0, f1, f2)))
    return out


class _Lane:
    """What has been told about one lane so far."""

    __slots__ = ("declared", "delivered", "filtered", "settled", "strict")

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.settled = 0
        self.delivered = 0
        self.declared = [0, 0, 0]
        self.filtered = [0, 0, 0]


class Accountant:
    """Turns counters into ledgers.  One for the life of the loaded programs."""

    def __init__(self, lanes: int) -> None:
        self._lanes = [_Lane(index % LANE_KINDS != UPROBE_KIND) for index in range(lanes)]
        self._missed = 0
        self._since_ns = 0
        self._state = struct.Struct(f"<QQ{lanes * STATE_BYTES // 8}Q")

    def begin(self, now_ns: int) -> None:
        """Start the first window at `now_ns`."""
        self._since_ns = now_ns

    def state(self) -> bytes:
        """Return all that is known, for `restore` in another process."""
        numbers = [self._since_ns, self._missed]
        for lane in self._lanes:
            numbers += (lane.settled, lane.delivered, *lane.declared, *lane.filtered)
        return self._state.pack(*numbers)

    def restore(self, state: bytes) -> None:
        """Go on where `state` was taken."""
        self._since_ns, self._missed, *numbers = self._state.unpack(state)
        for at, lane in enumerate(self._lanes):
            lane.settled, lane.delivered, *rest = numbers[at * 8 : at * 8 + 8]
            lane.declared, lane.filtered = rest[:3], rest[3:]

    @staticmethod
    def _explain(lane: _Lane, numbers: int, counters: LaneCounters) -> list[int]:
        """Share `numbers` lost ones out over the causes that the kernel counted and nobody told yet."""
        shares = [0, 0, 0]
        for cause, total in enumerate(counters.lost):
            shares[cause] = max(0, min(numbers, total - lane.declared[cause]))
            numbers -= shares[cause]
        # A hole that no counter explains is still a hole: the number was in flight when its program ended.
        shares[2] += max(0, numbers)
        return shares

    def settle(
        self,
        *,
        now_ns: int,
        lost_before: list[LaneCounters],
        taken_before: list[LaneCounters],
        after: list[LaneCounters],
        seen: bytes,
        emptied: bool,
        missed: int,
        last: bool = False,
    ) -> Ledger:
        """Return the ledger of the batch that was just drained.

        `lost_before` and `taken_before` are counters read, in this order, before the drain; `after` was read
        behind it.  `seen` are the reader's lane states (four u64 a lane: next, delivered, gaps, disorder).
        `emptied` says that the drain took all there was.  `missed` is the kernel's total of skipped program
        runs.  `last` settles every number there is, because nothing is attached any more: what was handed
        out and never came is lost as `inflight`.

        Raises `BrokenPromise` when the two sources contradict each other.
        """
        rows: list[LaneRow] = []
        lost: dict[str, int] = {}
        filtered: dict[str, int] = {}
        for index, lane in enumerate(self._lanes):
            _, delivered, gaps, disorder = _SEEN.unpack_from(seen, index * _SEEN.size)
            if disorder:
                raise BrokenPromise(f"lane {index} went backwards {disorder} times")
            counters = after[index]
            if lane.strict:
                # A gap before a record that arrived is lost. Tail losses that were told early are in `declared`.
                newly = self._explain(lane, gaps - sum(lane.declared), counters)
                if emptied:
                    told = sum(lane.declared) + sum(newly)
                    behind = taken_before[index].taken - delivered - told
                    if 0 < behind == sum(lost_before[index].lost) - told:
                        newly = self._explain(lane, sum(newly) + behind, counters)
            else:
                newly = [total - told for total, told in zip(counters.lost, lane.declared, strict=True)]
            first = lane.settled
            recorded = delivered - lane.delivered
            gone = sum(newly)
            short = counters.taken - (first + recorded + gone)
            if short < 0:
                raise BrokenPromise(f"lane {index}: {-short} more numbers settled than were handed out")
            if last:
                gone += short
                newly = self._explain(lane, gone, counters)
            lane.settled = first + recorded + gone
            lane.delivered = delivered
            for cause, name in enumerate(NUMBERED_CAUSES):
                lane.declared[cause] += newly[cause]
                if newly[cause]:
                    lost[name] = lost.get(name, 0) + newly[cause]
            for cause, name in enumerate(KERNEL_FILTERS):
                if delta := counters.filtered[cause] - lane.filtered[cause]:
                    filtered[name] = filtered.get(name, 0) + delta
                    lane.filtered[cause] = counters.filtered[cause]
            # The last batch names every lane that was used, so that a hole just before the end shows too.
            if lane.settled != first or (last and first):
                rows.append(LaneRow(index, first, lane.settled, recorded, 0, gone))
        if missed > self._missed:
            lost["probe_missed"] = missed - self._missed
            self._missed = missed
        start_ns, self._since_ns = self._since_ns, now_ns
        return Ledger(start_ns, now_ns, rows, filtered, lost)


def join(earlier: Ledger, later: Ledger) -> Ledger:
    """Return one ledger for two drains in a row, the earlier of which settled no number."""
    if earlier.lanes:
        raise BrokenPromise("only a ledger without numbers can be put in front of another")

    def add(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {cause: a.get(cause, 0) + b.get(cause, 0) for cause in a | b}

    return Ledger(
        earlier.start_ns,
        later.end_ns,
        later.lanes,
        add(earlier.filtered, later.filtered),
        add(earlier.lost, later.lost),
    )


def all_lost(ledger: Ledger, cause: str) -> Ledger:
    """Return the ledger of a batch whose records are lost for `cause`."""
    rows = [msgspec.structs.replace(row, recorded=0, lost=row.lost + row.recorded) for row in ledger.lanes]
    gone = sum(row.recorded for row in ledger.lanes)
    lost = {**ledger.lost, cause: ledger.lost.get(cause, 0) + gone} if gone else ledger.lost
    return msgspec.structs.replace(ledger, lanes=rows, lost=lost)
