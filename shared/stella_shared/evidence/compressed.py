"""Evidence lines as zstd frames (RFC 8878): in messages on the bus, and one after the other in chunk files.

    frame  = one batch's lines of one type, whole lines; it states how long they are, `MAX_FRAME_BYTES` at most
    chunk  = frames back to back, and nothing else: `zstdcat` gives the lines

The enricher makes a frame, and the signer appends it as it came: lines are compressed once.  Lines of a batch
differ in little but their numbers, so a frame has some 3 % of their length, for less than it costs to write them.

Whoever reads is given hostile bytes: a frame is looked at before it is unpacked, and what does not state its
length, or states too much, is refused.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from stella_shared.evidence import merkle

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: The value of the header `Content-Encoding` of a message that holds a frame.
ENCODING: Final = "zstd"
#: What a frame may unpack to.
MAX_FRAME_BYTES: Final = 8 << 20
#: Lines that a message may hold: far more than one drain of the ring, and no more leaf hashes than 2 MiB.
MAX_LINES: Final = 1 << 16
#: The fast end of the scale: for these lines it packs as well as level 3, at half its cost.
_LEVEL: Final = -3
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
#: Incompressible bytes grow by a 256th and some headers (ZSTD_COMPRESSBOUND).
_MAX_PACKED_BYTES: Final = MAX_FRAME_BYTES + (MAX_FRAME_BYTES >> 8) + 4096
_READ_BYTES: Final = 256 << 10
_OPTIONS: Final[dict[int, int]] = {zstd.CompressionParameter.compression_level: _LEVEL}


def pack(lines: bytes | memoryview) -> bytes:
    """Return lines as one frame; no lines are no bytes at all.  Raises `ValueError` for more than a frame holds."""
    if len(lines) > MAX_FRAME_BYTES:
        raise ValueError(f"{len(lines)} bytes of lines are more than a frame holds ({MAX_FRAME_BYTES})")
    return zstd.compress(lines, options=_OPTIONS) if lines else b""


def unpack(data: bytes) -> bytes:
    """Return the lines of exactly one frame, or none for no bytes.  Raises `ValueError` for anything else."""
    if not data:
        return b""
    size = _frame_bytes(data, whole=True)
    if size != len(data):
        raise ValueError(f"{len(data)} bytes hold a frame of {size} and something else")
    return _unpacked(data)


def _frame_bytes(data: bytes | memoryview, *, whole: bool) -> int:
    """Return the length of the frame that `data` begins with, 0 when it goes on behind it and `whole` is false."""
    # A read may end within the four bytes.
    if data[:4] != (_MAGIC if whole else _MAGIC[: len(data)]):
        raise ValueError("what is there is no zstd frame")
    try:
        # 18 bytes are the longest header (RFC 8878, section 3.1.1.1).
        if len(data) < 18 and not whole:
            return 0
        length = zstd.get_frame_info(data[:18]).decompressed_size
        if length is None or not 0 < length <= MAX_FRAME_BYTES:
            raise ValueError(f"a frame that says it holds {length} bytes, not 1 to {MAX_FRAME_BYTES}")
        return int(zstd.get_frame_size(data))
    except zstd.ZstdError:
        if not whole and len(data) < _MAX_PACKED_BYTES:
            return 0
        raise ValueError("a damaged zstd frame, or part of one") from None


def _unpacked(frame: bytes | memoryview) -> bytes:
    try:
        return zstd.decompress(frame)
    except zstd.ZstdError as e:
        raise ValueError(f"a damaged zstd frame: {e}") from None


class Packed(msgspec.Struct, frozen=True):
    """Frames of whole lines, and what a chunk must know of the lines: their length, and their leaf hashes in a row."""

    frames: bytes = b""
    length: int = 0
    leaves: bytes = b""

    @classmethod
    def of(cls, frame: bytes) -> Packed:
        """Return what is in the one frame of a message.  Raises `ValueError` as `unpack` does, and for half a line."""
        return cls._of(frame, unpack(frame))

    @classmethod
    def read(cls, frames: bytes) -> Packed:
        """Return what is in frames of a chunk file.  Raises `ValueError` as `of` does."""
        return cls.join([cls._of(b"", lines) for lines in FrameReader(io.BytesIO(frames)).frames()], frames)

    @classmethod
    def _of(cls, frame: bytes, lines: bytes) -> Packed:
        if lines and not lines.endswith(b"\n"):
            raise ValueError("its last line has no end")
        if (count := lines.count(b"\n")) > MAX_LINES:
            raise ValueError(f"a frame of {count} lines: none of ours has over {MAX_LINES}")
        return cls(frame, len(lines), merkle.leaf_hashes(lines))

    @classmethod
    def join(cls, parts: Sequence[Packed], frames: bytes | None = None) -> Packed:
        """Return the lines of all parts, in their order."""
        if len(parts) == 1 and frames is None:
            return parts[0]
        return cls(
            b"".join(part.frames for part in parts) if frames is None else frames,
            sum(part.length for part in parts),
            b"".join(part.leaves for part in parts),
        )

    @property
    def lines(self) -> int:
        """How many lines there are."""
        return len(self.leaves) // merkle.HASH_BYTES


class FrameReader:
    """Reads frames from a file, and digests the file as it goes: `sha256` is of what has been read of it."""

    def __init__(self, file: io.RawIOBase | io.BufferedIOBase) -> None:
        self._file = file
        self.sha256 = sha256()
        #: Bytes of the file that have been read.
        self.bytes = 0

    def frames(self) -> Iterator[bytes]:
        """Yield the lines of each frame.  Raises `ValueError` where the file goes on with something else."""
        held = b""
        at, more = 0, True
        while True:
            size = _frame_bytes(memoryview(held)[at:], whole=not more) if at < len(held) else 0
            if size:
                yield _unpacked(memoryview(held)[at : at + size])
                at += size
            elif more:
                # A frame that is longer than a read is asked for again with twice as much.
                new = self._read(max(_READ_BYTES, len(held) - at))
                held, at, more = held[at:] + new, 0, bool(new)
            else:
                return

    def rest(self) -> None:
        """Read, and digest, what is left of the file."""
        while self._read(_READ_BYTES):
            pass

    def _read(self, size: int) -> bytes:
        data = self._file.read(size) or b""
        self.sha256.update(data)
        self.bytes += len(data)
        return data


def frames_of(path: Path) -> Iterator[bytes]:
    """Yield the lines of a chunk file, frame by frame.  Raises `ValueError` where something else follows."""
    with path.open("rb", buffering=0) as file:
        yield from FrameReader(file).frames()


class LineStream:
    """The lines of a file of frames as one stream of bytes."""

    def __init__(self, reader: FrameReader) -> None:
        self._frames = reader.frames()
        self._lines = memoryview(b"")

    def readinto(self, room: memoryview) -> int:
        """Fill `room` as far as there are lines; return how many bytes.  Raises `ValueError` as `frames` does."""
        filled = 0
        while filled < len(room):
            if not self._lines:
                lines = next(self._frames, b"")
                if not lines:
                    break
                self._lines = memoryview(lines)
            count = min(len(room) - filled, len(self._lines))
            room[filled : filled + count] = self._lines[:count]
            self._lines = self._lines[count:]
            filled += count
        return filled
