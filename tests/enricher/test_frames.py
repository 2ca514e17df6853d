"""Frames of connects are named when lines are made: at once from memory, later when a file must be read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

import anyio
import jsonschema
import pytest

from stella_enricher.containers import HOST
from stella_enricher.frames import FrameNamer
from stella_enricher.lines import CLines, Lines, PythonLines
from stella_enricher.symbols.finding import Finder
from stella_enricher.symbols.resolver import Resolver
from stella_enricher.symbols.store import Store
from stella_shared import events, kernel_records
from stella_shared.evidence.compressed import unpack
from stella_shared.patterns import PathFilter
from stella_shared.wire import Program, RawBatch
from tests.enricher import symbol_oracles as oracle
from tests.enricher.record_maker import batch, net_connect, record

pytestmark = pytest.mark.anyio
validator = jsonschema.Draft202012Validator(events.json_schema())
LIBC = next(
    Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("libc.so.6")
)


@pytest.fixture
def anyio_backend() -> str:
    """The backend of this folder's asynchronous tests."""
    return "asyncio"


def libc_frames(*names: str) -> list[tuple[int, bytes, int]]:
    """Return kernel frames at the begin of libc's functions, one in no file, and one in an unknown file."""
    build_id, where = bytes.fromhex(oracle.build_id(LIBC)), oracle.segments(LIBC)
    functions = oracle.functions(LIBC, dynamic=True)
    begins = [next(begin for (begin, _), found in functions.items() if name in found) for name in names]
    offsets = [oracle.offset_of(where, begin) for begin in begins]
    return [
        *((1, build_id, offset + (16 if n else 0)) for n, offset in enumerate(offsets) if offset is not None),
        (2, bytes(20), 0x7F00_0000_1234),
        (1, b"\xee" * 20, 7),
    ]


def connects(frames: list[tuple[int, bytes, int]], *, times: int = 1, **more: object) -> RawBatch:
    """Return a batch of connects by a process of ours with this stack."""
    body = net_connect(
        8, b"", frames, result=0, fd=3, family=2, port=80, local_port=1, status=0, abstract=0,
        address=b"\x7f\0\0\1" + bytes(12), local=bytes(16),
    )  # fmt: skip
    data = b"".join(
        record(kernel_records.NET_CONNECT, 8, body, seq=n, tgid=os.getpid(), tid=os.getpid()) for n in range(times)
    )
    return batch(data, {0: times}, **more)  # type: ignore[arg-type]


def resolver(store: Path | None = None) -> Resolver:
    """Return a resolver that looks at nothing but processes and its store."""
    return Resolver(Finder([]), Store(store, 1 << 24) if store else None, max_answers=100, max_table_bytes=1 << 24)


def stack_of(lines: Lines, raw: RawBatch) -> tuple[list[dict[str, object]], bytes]:
    """Return the stack of the batch's first line, every line validated, and all its bytes."""
    (part,) = lines.build(raw, lambda _: HOST).parts
    for line in unpack(part.frame).splitlines():
        validator.validate(json.loads(line))
    first = json.loads(unpack(part.frame).splitlines()[0])
    return first["event"]["stack"], unpack(part.frame)


async def settled(namer: FrameNamer, raw: RawBatch) -> None:
    """Wait until nothing is missing any more."""
    await namer.settle(raw.records)
    with anyio.fail_after(30):
        while namer.stats()["waiting"]:
            await anyio.sleep(0.02)


@pytest.mark.parametrize("make", [CLines, PythonLines])
async def test_frames_are_pending_at_first_and_named_once_the_file_is_read(make: type[Lines]) -> None:
    """The process's own libc is found by its mappings; both builders write the same bytes before and after."""
    raw = connects(libc_frames("connect", "fflush"), times=3)
    with FrameNamer(resolver(), settle_seconds=0.01) as namer:
        lines, other = make(PathFilter([], []), frames=namer), PythonLines(PathFilter([], []), frames=namer)
        stack, body = stack_of(lines, raw)
        assert body == stack_of(other, raw)[1]
        assert ["pending", "pending", "no_build_id", "pending"] == [frame.get("symbol_reason") for frame in stack]
        assert "addr:0x7f0000001234" == stack[2]["symbol"]
        await settled(namer, raw)
        stack, body = stack_of(lines, raw)
        assert body == stack_of(other, raw)[1]
        assert [("connect", 0), ("fflush", 16)] == [(f["symbol"], f["symbol_offset"]) for f in stack[:2]]
        assert {"dynsym"} == {frame["symbol_source"] for frame in stack[:2]}
        assert "no_file" == stack[3]["symbol_reason"]
        assert "symbol" not in stack[3]
        assert b'"symbolizer":"stella-symbols/1 ' in body
        assert namer.generation > 0


async def test_what_is_kept_on_disk_is_there_for_the_same_batch(tmp_path: Path) -> None:
    """A table in the store is read within the wait, so the batch that first needs it has the names."""
    build_id = oracle.build_id(LIBC)
    assert "" == resolver(tmp_path).load(build_id, path=LIBC)
    raw = connects(libc_frames("connect")[:1], node="another")
    with FrameNamer(resolver(tmp_path), settle_seconds=5) as namer:
        lines = CLines(PathFilter([], []), frames=namer)
        stack_of(lines, raw)
        assert await namer.settle(b"")
        assert "connect" == stack_of(lines, raw)[0][0]["symbol"]
        assert not await namer.settle(b"")


class _Slow(Resolver):
    """A resolver on a disk that does not answer."""

    def load(self, build_id: str, pids: object = (), path: object = None) -> str:
        time.sleep(2)
        return "no_file"


async def test_a_slow_file_costs_one_wait_and_not_one_per_batch() -> None:
    """While the thread hangs, the first batch waits its 20 ms, the others not at all."""
    slow = _Slow(Finder([]), None, max_answers=10, max_table_bytes=1 << 20)
    with FrameNamer(slow) as namer:
        lines = CLines(PathFilter([], []), frames=namer)
        begin = time.monotonic()
        for n in range(20):
            raw = connects([(1, bytes([n]) * 20, n)])
            assert "pending" == stack_of(lines, raw)[0][0]["symbol_reason"]
            assert not await namer.settle(raw.records)
        assert time.monotonic() - begin < 1.0
        assert 20 == namer.stats()["waiting"]


async def test_switched_off_frames_say_so() -> None:
    """Without a resolver each frame keeps build-id and offset, with the reason."""
    with FrameNamer(None) as namer:
        raw = connects(libc_frames("connect"))
        stack, _ = stack_of(CLines(PathFilter([], []), frames=namer), raw)
        assert not await namer.settle(raw.records)
    assert ["disabled", "no_build_id", "disabled"] == [frame["symbol_reason"] for frame in stack]
    assert oracle.build_id(LIBC) == stack[0]["build_id"]
    assert {} == namer.stats()


class _Asked(Resolver):
    """A resolver that finds nothing and keeps which processes it was to look at."""

    asked: list[list[int]]

    def load(self, build_id: str, pids: Iterable[int] = (), path: object = None) -> str:
        self.asked.append(list(pids))
        return super().load("00" * 20)


@pytest.mark.parametrize("is_ours", [True, False])
async def test_processes_are_asked_for_files_of_our_own_batches_only(is_ours: bool) -> None:
    """Another node's process numbers mean nothing here, and records that cannot be a batch do not matter."""
    asked = _Asked(Finder([]), None, max_answers=100, max_table_bytes=1 << 24)
    asked.asked = []
    with FrameNamer(asked) as namer:
        raw = connects(libc_frames("connect")[:1])
        stack_of(PythonLines(PathFilter([], []), frames=namer), raw)
        await settled(namer, raw if is_ours else batch(b"", {}))
    assert [[os.getpid()] if is_ours else []] == asked.asked


async def test_a_program_that_is_gone_is_found_where_its_file_was(tmp_path: Path) -> None:
    """Its process has ended, and the batch says where the file is: the frame has its name; a wrong hint is harmless."""
    (tmp_path / "gone.c").write_text("int marked(int a) { return a + 1; }\n")
    program = tmp_path / "gone.so"
    command = ["gcc", "-shared", "-fPIC", "-Wl,--build-id", "-o", str(program), str(tmp_path / "gone.c")]
    await anyio.run_process(command)
    build_id = oracle.build_id(program)
    rows = (await anyio.run_process(["nm", str(program)])).stdout.decode().splitlines()
    offset = next(int(row.split()[0], 16) for row in rows if row.endswith(" marked"))
    raw = connects([(1, bytes.fromhex(build_id), offset)], node="another")
    for path, expected in ((str(program), (None, "marked")), ("/bin/cat", ("build_id_mismatch", None))):
        with FrameNamer(resolver(), settle_seconds=5) as namer:
            lines = CLines(PathFilter([], []), frames=namer)
            lines.build(raw, lambda _: HOST)
            namer.hint({77: Program(path, build_id=build_id), 78: Program("memfd:x", build_id=build_id)})
            await namer.settle(b"")
            stack, _ = stack_of(lines, raw)
            assert expected == (stack[0].get("symbol_reason"), stack[0].get("symbol"))
