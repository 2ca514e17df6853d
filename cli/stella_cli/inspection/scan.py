"""Streams chunk files for the lines of one subject.  Memory is bounded by a block and the longest line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from stella_cli.inspection.sightings import Line, Place, Sightings
from stella_cli.inspection.subject import Subject
from stella_shared.errors import BadAnswer
from stella_shared.evidence.lines import MAX_LINE_BYTES, blocks

_REASON: Final = re.compile(rb'"(?:container|image)_reason":"((?:[^"\\]|\\.){0,120})')
_CONTAINER_REASON: Final = re.compile(rb'"container_reason":"((?:[^"\\]|\\.){0,120})')
_REASONS_MAX: Final = 64


class Scan:
    """A pass over chunks.  `unnamed` counts events of containers that could not be named, by reason."""

    def __init__(self, subject: Subject, found: Sightings) -> None:
        self.found = found
        self.unnamed: dict[str, int] = {}
        self._subject = subject
        # Whoever asks for a container needs its id alone; an image needs a runtime's answer too.
        self._reason = _REASON if subject.kind == "image" else _CONTAINER_REASON
        self._decode = msgspec.json.Decoder(Line).decode

    def read(self, chunk: int, path: Path, progress: Callable[[int], None]) -> None:
        """Take in one chunk's file.  What comes after the last newline of an open one is not there yet."""
        rest, lines = b"", 0
        for block in blocks(path):
            data = rest + block
            end = data.rfind(b"\n") + 1
            self._block(chunk, lines, data, end)
            lines += data.count(b"\n", 0, end)
            rest = data[end:]
            if len(rest) > MAX_LINE_BYTES:
                raise BadAnswer(f"{path}: line {lines + 1} is over {MAX_LINE_BYTES} bytes")
            progress(len(block))

    def _block(self, chunk: int, before: int, data: bytes, end: int) -> None:
        for reason in self._reason.findall(data, 0, end):
            text = reason.decode(errors="replace")
            if text in self.unnamed or len(self.unnamed) < _REASONS_MAX:
                self.unnamed[text] = self.unnamed.get(text, 0) + 1
        line, counted_to = before, 0
        for begin in sorted(self._begins(data, end)):
            line += data.count(b"\n", counted_to, begin)
            counted_to = begin
            text = data[begin : data.index(b"\n", begin)]
            try:
                seen = self._decode(text)
            except (msgspec.MsgspecError, RecursionError, UnicodeError):
                self.found.unreadable += 1
                continue
            if self._subject.is_of(seen):
                self.found.add(seen, Place(chunk, line + 1, seen.boot_id, seen.ts_ns))

    def _begins(self, data: bytes, end: int) -> set[int]:
        """Return where lines begin that hold a needle."""
        found = set()
        for needle in self._subject.needles:
            at = data.find(needle, 0, end)
            while at >= 0:
                found.add(data.rfind(b"\n", 0, at) + 1)
                at = data.find(needle, data.index(b"\n", at), end)
        return found
