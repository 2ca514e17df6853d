"""Which numbers of each lane are here, and whether one is here twice: exact, in bounded memory.

A lane whose range is not much wider than what was recorded has one bit for each of its numbers.  The numbers of
other lanes, and those beyond a range, are kept at eight bytes each and sorted at the end.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence
from ctypes import Array, c_uint8
from itertools import pairwise
from typing import Final

import msgspec

from stella_shared.evidence import native_lines
from stella_shared.evidence.native_lines import NONE_TWICE, UNSURE, Lane, Place

#: At most as many bits as eight bytes for each number would take.
_BITS_PER_NUMBER: Final = 64
_BITS_ALWAYS: Final = 1024
NUMBER_MAX: Final = 2**64 - 1


class LaneRange(msgspec.Struct, frozen=True):
    """A lane of a ledger.  `ordered` numbers must be in `[first, next)`."""

    number: int
    first: int
    next: int
    recorded: int
    ordered: bool


class LaneNumbers:
    """The numbers of one chunk, by the index of their lane in `ranges`."""

    def __init__(self, ranges: Sequence[LaneRange]) -> None:
        self._ranges = ranges
        self.lanes: Array[Lane] = (Lane * len(ranges))()
        for lane, row in zip(self.lanes, ranges, strict=True):
            lane.number, lane.ordered, lane.twice = row.number, row.ordered, NONE_TWICE
            lane.first, lane.next = max(row.first, 0), max(row.next, 0)
        self._bits: Array[c_uint8] = (c_uint8 * 0)()
        self._beyond: dict[int, array[int]] = {}

    def expect(self, chunk_bytes: int) -> None:
        """Make room for the numbers of a chunk of that size: never more than a quarter of it, and a little."""
        room, at = chunk_bytes // 4 + (64 << 10), 0
        for lane, row in zip(self.lanes, self._ranges, strict=True):
            span = lane.next - lane.first
            size = (span + 7) // 8
            if 0 < span <= row.recorded * _BITS_PER_NUMBER + _BITS_ALWAYS and at + size <= room:
                lane.bits_at, lane.bits = at, span
                at += size
        # A mapping's pages are taken when they are first written to.
        self._bits = (c_uint8 * at).from_buffer(mmap.mmap(-1, max(at, 1)))

    def add(self, lane: int, number: int) -> None:
        """Note a number, 0 to `NUMBER_MAX`."""
        row = self.lanes[lane]
        bit = number - row.first
        if not 0 <= bit < row.bits:
            self._beyond.setdefault(lane, array("Q")).append(number)
            return
        row.count += 1
        at, mask = row.bits_at + (bit >> 3), 1 << (bit & 7)
        if self._bits[at] & mask:
            row.twice = min(row.twice, number)
        self._bits[at] |= mask

    def mark(self, places: Array[Place], count: int) -> list[tuple[int, int]]:
        """Note the numbers of lines that were placed; return (line, offset in the block) of those that were not."""
        lib = native_lines.library()
        assert lib is not None, "places come from the same library"
        left = int(lib.stella_lines_mark(self.lanes, self._bits, places, count))
        unsure = []
        for place in places[:left]:
            if place.lane == UNSURE:
                unsure.append((place.line, place.seq))
            else:
                self._beyond.setdefault(place.lane, array("Q")).append(place.seq)
        return unsure

    def count(self, lane: int) -> int:
        """Return how many numbers were noted."""
        return self.lanes[lane].count + len(self._beyond.get(lane, ()))

    def twice(self, lane: int) -> int | None:
        """Return the smallest number that was noted more than once."""
        found = [self.lanes[lane].twice]
        found += [a for a, b in pairwise(sorted(self._beyond.get(lane, ()))) if a == b][:1]
        return min((n for n in found if n != NONE_TWICE), default=None)
