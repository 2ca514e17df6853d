"""Cleaning up: the lines of old chunks go, everything that proves the chain stays.

    verify the chain → note the spans → the signer records the notes, signed → remove NNNNNN.ndjson.zst, sync

Ledgers, envelopes and proofs stay, so links, signatures and accounting can be checked from the first chunk on.
The note is signed before the first file goes: a crash anywhere leaves a chain that verifies, and the next
cleanup goes on where this one ended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from stella_shared.errors import UsageError
from stella_shared.evidence import names, notes, report
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.records import Note
from stella_shared.evidence.report import ChainReport, ChunkReport
from stella_shared.evidence.store import Places

_UNIT_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE: Final = re.compile(r"([0-9]{1,6})([mhdw])")
_UNSOUND: Final = frozenset({report.INVALID, report.UNSIGNED, report.UNTRUSTED_KEY})


def age_seconds(text: str) -> int:
    """Return an age such as `7d` in seconds; m, h, d and w are known.  Raises `UsageError`."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is no age", hint="a number and a unit: 90m, 12h, 7d or 4w")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


class Span(msgspec.Struct, frozen=True):
    """Chunks from `first` to `last`."""

    first: int
    last: int


class Cleanup:
    """One cleanup of a chain that verifies: what can go, and its removal."""

    def __init__(
        self, where: Places, chain: ChainReport, *, ended_before: str, must_be_logged: bool, disk: Disk | None = None
    ) -> None:
        """`chain` is a valid report.  `ended_before` is UTC as text; `must_be_logged` asks for a log's bundle."""
        self._where = where
        self._chunks = {chunk.index: chunk for chunk in chain.chunks}
        self._told = [(told.chunk, told.note) for told in chain.notes if self._sound(told.chunk)]
        self._newest = max((index for index in self._chunks if self._sound(index)), default=0)
        self._ended_before = ended_before
        self._must_be_logged = must_be_logged
        self._disk = disk or Disk()
        self._newest_logged = max((i for i in self._chunks if where.chunk(i, names.BUNDLE).exists()), default=0)
        self.indexes = [index for index in sorted(self._chunks) if self.removable(index)]

    def _sound(self, index: int) -> bool:
        return index in self._chunks and self._chunks[index].status not in _UNSOUND

    def _old(self, chunk: ChunkReport) -> bool:
        return bool(chunk.end) and chunk.end < self._ended_before

    def _logged(self, index: int) -> bool:
        """Return whether a log entry vouches for the chunk: its own, or that of a later one, which follows from it."""
        return index <= self._newest_logged

    def removable(self, index: int) -> bool:
        """Return whether the lines of chunk `index` can go.

        It is signed, neither the first nor the newest signed chunk, its window ended long enough ago, its lines
        are here, and it is in the log when it is to be there.
        """
        return (
            self._sound(index)
            and index not in (names.FIRST_INDEX, self._newest)
            and self._old(self._chunks[index])
            and self._where.chunk(index, names.DATA).exists()
            and (self._logged(index) or not self._must_be_logged)
        )

    @property
    def kept_for_the_log(self) -> list[int]:
        """The chunks that stay only because they are to be submitted to a log and are not in it yet."""
        return [
            index
            for index, chunk in sorted(self._chunks.items())
            if self._must_be_logged and self._old(chunk) and not self._logged(index)
            and index not in (names.FIRST_INDEX, self._newest)
        ]  # fmt: skip

    @property
    def bytes(self) -> int:
        """What the lines that can go take on the disk."""
        return sum(self._where.chunk(index, names.DATA).stat().st_size for index in self.indexes)

    def notes(self) -> list[Note]:
        """Return a note for each span of removable chunks that no signed note accounts for yet."""
        uncovered = set(self.indexes) - notes.covered(set(self.indexes), self._told)
        return [
            notes.make(
                notes.CLEANUP, first=span.first, last=span.last, text=f"windows ended before {self._ended_before}"
            )
            for span in spans(sorted(uncovered))
        ]

    def remove(self) -> None:
        """Remove the lines, durably.  Call only when every note of `notes` is in a signed chunk."""
        for index in self.indexes:
            self._disk.remove(self._where.chunk(index, names.DATA))
        if self.indexes:
            self._disk.sync_directory(self._where.evidence)


def spans(indexes: list[int]) -> Iterator[Span]:
    """Yield the spans of neighbours in an ascending list."""
    first = last = 0
    for index in indexes:
        if first and index != last + 1:
            yield Span(first, last)
            first = 0
        first, last = first or index, index
    if first:
        yield Span(first, last)


def _signed(where: Places) -> list[int]:
    """Return the chunks that have an envelope."""
    with os.scandir(where.evidence) as entries:
        files = [names.parse_chunk_file(entry.name) for entry in entries]
    return sorted(file.index for file in files if file is not None and file.kind == names.ENVELOPE)


def newest_signed(where: Places) -> int:
    """Return the newest chunk that has an envelope, 0 when there is none."""
    return max(_signed(where), default=0)


def signed_with(where: Places, wanted: set[str], since: int) -> set[str]:
    """Return those of the note ids `wanted` that signed chunks from `since` on record."""
    return {note.id for index in _signed(where) if index >= since for note in notes.recorded(where, index)} & wanted
