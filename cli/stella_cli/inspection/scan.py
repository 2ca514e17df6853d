"""Streams chunk files for the lines of one subject.  Memory is bounded by a block and the longest line.

A container's first events may be recorded before its runtime has told the image.  A container has one image, so they
are the image's all the same where any other line of that container names it: that is what `Unnamed` is for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from stella_cli.inspection.sightings import Line, Place, Sightings
from stella_cli.inspection.subject import Subject
from stella_shared.errors import BadAnswer
from stella_shared.evidence.compressed import FrameReader
from stella_shared.evidence.lines import MAX_LINE_BYTES

_CONTAINER: Final = re.compile(rb'"container_id":"([^"\\]{1,128})"')
_KNOWN: Final = (b'"image_digest":"', b'"image_repo_digests":[')
#: Containers with unnamed events that are told apart.
CONTAINERS_MAX: Final = 10_000
_REASONS_MAX: Final = 64

Progress = Callable[[int], None]


def pieces(path: Path, progress: Progress) -> Iterator[tuple[int, bytes, int]]:
    """Yield (lines before, data, end): whole lines are `data[:end]`; what follows the last newline is not there yet."""
    rest, lines, told = b"", 0, 0
    with path.open("rb", buffering=0) as file:
        reader = FrameReader(file)
        try:
            for block in reader.frames():
                data = rest + block
                end = data.rfind(b"\n") + 1
                yield lines, data, end
                lines += data.count(b"\n", 0, end)
                rest = data[end:]
                if len(rest) > MAX_LINE_BYTES:
                    raise BadAnswer(f"{path}: line {lines + 1} is over {MAX_LINE_BYTES} bytes")
                progress(reader.bytes - told)
                told = reader.bytes
        except ValueError:
            # Of a closed chunk verification has told it; the last frame of an open one may be half written.
            return


def line_at(data: bytes, at: int) -> bytes:
    """Return the line around a place in whole lines."""
    return data[data.rfind(b"\n", 0, at) + 1 : data.index(b"\n", at)]


class Unnamed:
    """Events of processes whose image, or whose container, could not be named: by container and reason."""

    def __init__(self, member: bytes) -> None:
        self._needle = b'"' + member + b'":"'
        self._reason = re.compile(re.escape(self._needle) + rb'((?:[^"\\]|\\.){0,120})')
        self.by_container: dict[str, dict[str, int]] = {}

    def count(self, data: bytes, end: int) -> None:
        """Count those of whole lines."""
        at = data.find(self._needle, 0, end)
        while at >= 0:
            line = line_at(data, at)
            container, reason = _CONTAINER.search(line), self._reason.search(line)
            name = container[1].decode(errors="replace") if container else ""
            if name not in self.by_container and len(self.by_container) >= CONTAINERS_MAX:
                name = ""
            reasons = self.by_container.setdefault(name, {})
            text = reason[1].decode(errors="replace") if reason else ""
            if text in reasons or len(reasons) < _REASONS_MAX:
                reasons[text] = reasons.get(text, 0) + 1
            at = data.find(self._needle, data.index(b"\n", at), end)

    def open_questions(self) -> set[str]:
        """Return the containers whose image another line may name."""
        return {name for name in self.by_container if "://" in name}

    def by_reason(self) -> dict[str, int]:
        """Return how many there are, by reason."""
        sums: dict[str, int] = {}
        for reasons in self.by_container.values():
            for reason, n in reasons.items():
                sums[reason] = sums.get(reason, 0) + n
        return dict(sorted(sums.items()))


class Scan:
    """A pass over chunks.  `later` counts events that are the subject's by their container alone."""

    def __init__(self, subject: Subject, found: Sightings) -> None:
        self.found = found
        self.later = 0
        self._subject = subject
        # Whoever asks for a container needs its id alone; an image needs a runtime's answer too.
        self._unnamed = [Unnamed(b"container_reason")]
        if subject.kind != "container":
            self._unnamed.append(Unnamed(b"image_reason"))
        self._decode = msgspec.json.Decoder(Line).decode

    @property
    def unnamed(self) -> dict[str, int]:
        """Events that may be the subject's, for nobody knows whose they are; by reason."""
        sums: dict[str, int] = {}
        for unnamed in self._unnamed:
            for reason, n in unnamed.by_reason().items():
                sums[reason] = sums.get(reason, 0) + n
        return dict(sorted(sums.items()))

    @property
    def unnamed_containers(self) -> list[str]:
        """The containers that those events are of, where that is known."""
        return sorted({name for unnamed in self._unnamed for name in unnamed.by_container if name})

    def read(self, chunk: int, path: Path, progress: Progress) -> None:
        """Take in one chunk's file."""
        for before, data, end in pieces(path, progress):
            for unnamed in self._unnamed:
                unnamed.count(data, end)
            for place, line in self._lines(chunk, before, data, end, self._subject.needles):
                if self._subject.is_of(line):
                    self.found.add(line, place)

    def settle(self, files: list[tuple[int, Path]], progress: Progress) -> None:
        """Find out whose the unnamed events are, from other lines of their containers."""
        images = self._unnamed[-1]
        questions = images.open_questions() if self._subject.kind != "container" else set()
        if not questions:
            return
        answers = _images_of(questions, files, progress)
        mine = sorted(name for name, line in answers.items() if self._subject.is_of(line))
        for name in answers:
            del images.by_container[name]
        needles = tuple(f'"container_id":"{name}"'.encode() for name in mine)
        for chunk, path in files if mine else ():
            for before, data, end in pieces(path, progress):
                for place, line in self._lines(chunk, before, data, end, needles):
                    if line.container_id in answers and not line.image_digest and not self._subject.is_of(line):
                        known = answers[line.container_id]
                        self.found.add(msgspec.structs.replace(line, image_digest=known.image_digest), place)
                        self.later += 1

    def _lines(
        self, chunk: int, before: int, data: bytes, end: int, needles: tuple[bytes, ...]
    ) -> Iterator[tuple[Place, Line]]:
        """Yield the lines that hold a needle."""
        line, counted_to = before, 0
        for begin in sorted(_begins(data, end, needles)):
            line += data.count(b"\n", counted_to, begin)
            counted_to = begin
            try:
                seen = self._decode(data[begin : data.index(b"\n", begin)])
            except (msgspec.MsgspecError, RecursionError, UnicodeError):
                self.found.unreadable += 1
                continue
            yield Place(chunk, line + 1, seen.boot_id, seen.ts_ns), seen


def _begins(data: bytes, end: int, needles: tuple[bytes, ...]) -> set[int]:
    """Return where lines begin that hold a needle."""
    found = set()
    for needle in needles:
        at = data.find(needle, 0, end)
        while at >= 0:
            found.add(data.rfind(b"\n", 0, at) + 1)
            at = data.find(needle, data.index(b"\n", at), end)
    return found


def _images_of(containers: set[str], files: list[tuple[int, Path]], progress: Progress) -> dict[str, Line]:
    """Return for each container a line that names its image, where one does."""
    wanted = {name.encode() for name in containers}
    found: dict[str, Line] = {}
    decode = msgspec.json.Decoder(Line).decode
    for _, path in files:
        for _, data, end in pieces(path, progress):
            for match in _CONTAINER.finditer(data, 0, end):
                if match[1] not in wanted:
                    continue
                text = line_at(data, match.start())
                if not any(known in text for known in _KNOWN):
                    continue
                try:
                    line = decode(text)
                except (msgspec.MsgspecError, RecursionError, UnicodeError):
                    continue
                if line.image_digest and line.container_id.encode() in wanted:
                    found[line.container_id] = line
                    wanted.discard(line.container_id.encode())
            if not wanted:
                return found
    return found
