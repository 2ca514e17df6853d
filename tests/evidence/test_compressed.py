"""Frames of lines: they come back, they are what other implementations read, and nothing else passes for one."""

from __future__ import annotations

import io
import random
import subprocess
from pathlib import Path

import pytest
from chain_maker import Node, Source, one, resign, small_chain
from hypothesis import given
from hypothesis import strategies as st

from stella_shared.evidence import compressed
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.compressed import MAX_FRAME_BYTES, FrameReader, LineStream, Packed, pack, unpack

LINES = b"".join(b'{"lane":0,"seq":%d}\n' % n for n in range(2000))
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


def read(data: bytes) -> bytes:
    return b"".join(FrameReader(io.BytesIO(data)).frames())


def zstd(data: bytes, *flags: str) -> bytes:
    """Return what Debian's `zstd` makes of bytes."""
    return subprocess.run(["zstd", "-cq", *flags], input=data, capture_output=True, check=True).stdout


@given(st.lists(st.binary(max_size=300), max_size=12))
def test_lines_come_back(parts: list[bytes]) -> None:
    """From one frame, and from many in a row, read in any way."""
    for part in parts:
        assert part == unpack(pack(part))
    whole, file = b"".join(parts), b"".join(map(pack, parts))
    assert whole == read(file)
    assert whole == read(file)
    reader, room = FrameReader(io.BytesIO(file)), bytearray(7)
    stream, got = LineStream(reader), b""
    while count := stream.readinto(memoryview(room)):
        got += room[:count]
    assert (whole, len(file)) == (got, reader.bytes)


def test_other_implementations_read_it_and_are_read() -> None:
    """The zstd command unpacks our frames, and a file of its making, size stated, is as good."""
    assert LINES * 2 == zstd(pack(LINES) + pack(LINES), "-d")
    assert len(pack(LINES)) < len(LINES) // 4
    theirs = zstd(LINES, "-19", f"--stream-size={len(LINES)}")
    assert LINES == unpack(theirs) == read(theirs)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x", "no zstd frame"),
        (LINES, "no zstd frame"),
        (SKIPPABLE, "no zstd frame"),
        (pack(LINES) + SKIPPABLE, "something else"),
        (pack(LINES) + b"\0", "something else"),
        (pack(LINES) + pack(LINES), "something else"),
        (pack(LINES)[:-1], "part of one"),
        (pack(LINES)[:4], "part of one"),
        (zstd(LINES, "--no-content-size") if Path("/usr/bin/zstd").exists() else b"", "holds None bytes"),
        (zstd(b"") if Path("/usr/bin/zstd").exists() else b"", "holds 0 bytes"),
        (zstd(b"\n" * (MAX_FRAME_BYTES + 1), f"--stream-size={MAX_FRAME_BYTES + 1}"), "not 1 to"),
    ],
    ids=["short", "plain", "skippable", "followed", "tail", "two", "cut", "head", "unsized", "empty", "bomb"],
)
def test_what_is_not_one_frame_is_refused(data: bytes, said: str) -> None:
    """A message holds one frame, whole, which says how long its lines are; a file may hold many, and no more."""
    with pytest.raises(ValueError, match=said):
        unpack(data)
    if data != pack(LINES) + pack(LINES):
        with pytest.raises(ValueError, match=r"no zstd frame|part of one|holds|damaged"):
            read(data)


def test_a_frame_is_bounded() -> None:
    """What is too long to be one is not made, and the longest comes back whatever it holds."""
    longest = random.Random(3).randbytes(MAX_FRAME_BYTES)
    assert longest + LINES == read(pack(longest) + pack(LINES))
    with pytest.raises(ValueError, match="more than a frame holds"):
        pack(longest + b"x")


def test_every_changed_byte_is_refused_or_gives_other_lines() -> None:
    """No change of a frame ends in anything but lines or `ValueError`."""
    frame, chance = pack(LINES), random.Random(5)
    for _ in range(3000):
        changed = bytearray(frame)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        for reads in (unpack, read):
            try:
                assert len(reads(bytes(changed))) <= MAX_FRAME_BYTES
            except ValueError:
                continue


@pytest.mark.parametrize("size", [*range(1, 40), 4096])
def test_a_read_may_end_anywhere(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Within a frame's first bytes, its header, its blocks: the lines are the same, and half a frame is damage."""
    monkeypatch.setattr(compressed, "_READ_BYTES", size)
    file = pack(b"a line\n") * 30 + pack(LINES)
    assert b"a line\n" * 30 + LINES == read(file)
    for cut in (1, 2, 3, len(pack(LINES)) - 2):
        with pytest.raises(ValueError, match=r"no zstd frame|part of one"):
            read(file[: 30 * len(pack(b"a line\n"))] + pack(LINES)[:cut])


def test_a_message_of_more_lines_than_a_batch_can_have_is_refused() -> None:
    """Some hundred bytes would else become 256 MiB of leaf hashes."""
    assert compressed.MAX_LINES == Packed.of(pack(b"\n" * compressed.MAX_LINES)).lines
    with pytest.raises(ValueError, match="a frame of 8388608 lines"):
        Packed.of(pack(b"\n" * MAX_FRAME_BYTES))


def test_small_frames_are_read_as_fast_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read serves all frames in it: ten thousand of one line take no more reads than their bytes do."""
    file, reads = io.BytesIO(pack(b"a line\n") * 10_000), 0

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal reads
            reads += 1
            return super().read(size)

    counted = Counted(file.getvalue())
    assert 10_000 == sum(1 for _ in FrameReader(counted).frames())
    assert reads <= len(file.getvalue()) // compressed._READ_BYTES + 3


@pytest.mark.parametrize("native", [True, False])
def test_damage_behind_good_frames_is_told_with_the_digest_of_the_whole_file(tmp_path: Path, native: bool) -> None:
    """Lines before it are there, and the file's digest is that of all of it."""
    path = tmp_path / "chunk"
    path.write_bytes(pack(LINES) + b"rubbish" * 100_000)
    with ChunkReader(native=native) as reader:
        digest = reader.read(path)
    assert "no zstd frame" in digest.damage
    [total] = subprocess.run(["sha256sum", path], capture_output=True, check=True).stdout.split()[:1]
    assert total.decode() == digest.sha256


@pytest.mark.parametrize(
    ("file", "said"),
    [(lambda lines: pack(lines) + SKIPPABLE, "no zstd frame"), (lambda lines: lines, "no zstd frame"),
     (lambda lines: pack(lines) + pack(lines), "more than the")],
    ids=["followed", "plain", "more"],
)  # fmt: skip
def test_a_signed_file_that_is_not_the_lines_is_named(tmp_path: Path, file: object, said: str) -> None:
    """Even with the node's own key, a chunk that holds something else than its lines does not verify."""
    node = small_chain(tmp_path)
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        node.file(4, kind).unlink()
    lines = node.lines(3)
    resign(node, 3, lines, file=file(lines))  # type: ignore[operator]
    report = node.verify()
    assert [("malformed", 3)] == [(fault.code, fault.chunk) for fault in report.faults]
    assert said in report.faults[0].message


def test_a_chunk_that_unpacks_without_end_takes_no_more_than_its_ledger_says(tmp_path: Path) -> None:
    """64 MiB of lines in a few kilobytes: the reader stops where the ledger ends."""
    node = Node(tmp_path)
    store = node.open()
    store.commit(*one(Source(node.name).batch({0: 2}, final=True)))
    store.close("size")
    store.release()
    bomb = pack(b"\n" * MAX_FRAME_BYTES) * 8
    resign(node, 2, node.lines(2), file=bomb)
    seen: list[int] = []
    report = node.verify(progress=lambda done, total: seen.append(done))
    assert ["malformed"] == [fault.code for fault in report.faults]
    assert seen[-1] == node.file(1, "ndjson.zst").stat().st_size + len(bomb)
