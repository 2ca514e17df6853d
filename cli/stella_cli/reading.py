"""`stella signals lines`: the evidence lines of chunks, unpacked to stdout.  Nothing is verified here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from stella_shared.errors import BadAnswer, NotFound, NotPermitted, UsageError
from stella_shared.evidence import names
from stella_shared.evidence.compressed import frames_of

_CHUNKS: Final = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")
_DAMAGED: Final = "stella signals verify-chain says what is wrong there"


def lines(evidence: Path, chunks: list[str]) -> None:
    """Write the lines of the chunks asked for, of all when none is, in the order of their indexes."""
    asked = [_span(text) for text in chunks]
    try:
        files = _files(evidence)
        for first, last in asked:
            if not any(first <= index <= last for index in files):
                raise NotFound(
                    f"{evidence} holds no lines of chunk {first}" + (f" to {last}" if last != first else ""),
                    hint=f"stella signals verify-chain {evidence} --verbose shows the chunks",
                )
        for index in sorted(files):
            if not asked or any(first <= index <= last for first, last in asked):
                for frame in _frames(evidence, index, files[index]):
                    sys.stdout.buffer.write(frame)
        sys.stdout.buffer.flush()
    except PermissionError as e:
        raise NotPermitted(f"{e.filename}: {e.strerror}", hint="evidence is readable by its owner, and root") from None


def _span(text: str) -> tuple[int, int]:
    match = _CHUNKS.fullmatch(text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise UsageError(f"{text!r} is no chunk", hint="a chunk's index as 42, or a range as 42-45")
    return int(match[1]), int(match[2] or match[1])


def _files(evidence: Path) -> dict[int, str]:
    """Return the kind of file that holds each chunk's lines."""
    if not evidence.exists():
        raise NotFound(f"no evidence at {evidence}", hint="name an evidence directory with --evidence")
    if not evidence.is_dir():
        raise UsageError(f"{evidence} is no directory", hint="unpack an archive first")
    found = [names.parse_chunk_file(path.name) for path in evidence.iterdir()]
    return {file.index: file.kind for file in found if file is not None and file.kind in (names.DATA, names.OPEN_DATA)}


def _frames(evidence: Path, index: int, kind: str) -> Iterator[bytes]:
    path = evidence / names.chunk_file(index, kind)
    try:
        yield from frames_of(path)
    except FileNotFoundError:
        if kind == names.DATA:
            raise NotFound(f"{path} went away meanwhile", hint="a cleanup may have taken it") from None
        # It was closed meanwhile, under its other name.
        yield from _frames(evidence, index, names.DATA)
    except ValueError as e:
        # The signer may be writing the last frame of the open chunk at this moment.
        if kind == names.DATA:
            raise BadAnswer(f"{path}: {e}", hint=_DAMAGED) from None
