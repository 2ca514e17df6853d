"""The quick check in C and the verdict in Python: one answer, whatever the line and wherever a block ends."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chain_maker import BOOT, RUN, line
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_shared.evidence import chunk_reader, lines, merkle, native_lines
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.compressed import pack
from stella_shared.evidence.lines import LineChecker
from stella_shared.evidence.native_lines import UNSURE, Place
from stella_shared.evidence.records import Ledger, Run, Window
from stella_shared.wire import LaneRow

NODE = "node-a"
HERE = Path(__file__).parent
C_SOURCE = Path(lines.__file__).with_suffix(".c")

#: Lanes 0 and 4 are plain, 3 and 7 are those of probes whose numbers may come late, 8 is idle.
LANES = [
    LaneRow(0, 0, 100, 0, 0, 100), LaneRow(3, 5, 9, 2, 0, 2), LaneRow(4, 0, 10**12, 1, 0, 0),
    LaneRow(7, 0, 2, 0, 0, 2), LaneRow(8, 3, 3, 0, 0, 0),
]  # fmt: skip


def ledger(runs: dict[str, str] | None = None, lanes: list[LaneRow] | None = None) -> Ledger:
    """Return a ledger with these runs (name to boot) and lanes, as far as lines are concerned."""
    return Ledger(
        1, "c" * 32, 2, "", 0, 0, "", "", Window("", "", []), "size",
        [
            Run(boot, name, "0", 0, 1, [], lanes or LANES, {}, False, False, "", None, False)
            for name, boot in (runs or {RUN: BOOT, "r\u00fcn\n": "b\u00f6\"ot"}).items()
        ],
        [], {}, {}, [], [],
    )  # fmt: skip


def checker() -> LineChecker:
    made = LineChecker(ledger(), NODE)
    made.numbers.expect(1 << 20)
    return made


def vouched(text: bytes) -> tuple[int, int] | None:
    """Return (lane, number) when the C code vouches for a line, else None."""
    table = checker().table()
    assert table is not None
    room = (native_lines.c_uint8 * (len(text) + 1)).from_buffer_copy(text + b"\n")
    places = (Place * 1)()
    found, consumed = table.place(native_lines.ctypes.addressof(room), len(text) + 1, places)
    assert (1, len(text) + 1) == (found, consumed)
    return None if places[0].lane == UNSURE else (places[0].lane, places[0].seq)


def judged(text: bytes) -> tuple[int, int] | None:
    """Return (lane, number) when Python finds nothing wrong with a line, else None."""
    noted: list[tuple[int, int]] = []
    judge = checker()
    judge.numbers.add = lambda lane, number: noted.append((lane, number))  # type: ignore[method-assign]
    judge.judge(1, text)
    return noted[0] if noted and not judge._faults else None


def placed(**extra: Any) -> bytes:
    """Return a canonical line of lane 0 with more members."""
    members = {"boot_id": BOOT, "lane": 0, "node": NODE, "run": RUN, "seq": 7} | extra
    return msgspec.json.encode(members, order="sorted")


_TEXTS = st.text(max_size=12) | st.sampled_from(
    ['\x00\x1f\x08\t\n\x0b\x0c\r"\\/', "\u2028\u007f", "\U0001f600", "plain"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False,
    allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
_MEMBERS = st.fixed_dictionaries(
    {},
    optional={
        "boot_id": st.sampled_from([BOOT, 'b\u00f6"ot', "other"]) | _VALUES,
        "lane": st.sampled_from([0, 3, 4, 7, 8, 9, -1]) | _VALUES,
        "node": st.sampled_from([NODE, NODE, "node-b"]) | _VALUES,
        "run": st.sampled_from([RUN, "r\u00fcn\n", "nobody"]) | _VALUES,
        "seq": st.integers(-2, 120) | st.integers(2**63 - 2, 2**64 + 2) | _VALUES,
        "event": _VALUES,
        "a": _VALUES,
        "zz": _VALUES,
    },
)


@settings(deadline=None)
@given(_MEMBERS)
def test_what_c_vouches_for_python_finds_right(members: dict[str, Any]) -> None:
    """Any canonical line: the same lane and number, or it is left to Python."""
    text = placed(**members)
    assert vouched(text) in (None, judged(text))


@settings(deadline=None)
@given(st.binary(max_size=60) | _MEMBERS.map(lambda m: json.dumps(m).encode()))
def test_any_other_text_is_not_vouched_for_unless_it_is_right(text: bytes) -> None:
    """Whatever bytes stand in a line."""
    text = text.replace(b"\n", b" ")
    assert vouched(text) in (None, judged(text))


_MARKS = b'{}[]",:\\/0123456789-+.eEtfnu \r\t\x00\x01\x1f\x7f\x80\xbf\xc0\xc2\xe0\xed\xa0\xf0\xf4\xff'


def mutated(text: bytes, chance: random.Random) -> bytes:
    """Return a line with a few changes: flips, cuts, doubled stretches, swapped members, deep nesting."""
    data = bytearray(text)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data))
        span = data[at : at + chance.randint(1, 20)]
        match chance.randrange(7):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice(_MARKS)
            case 2:
                del data[at : at + len(span)]
            case 3:
                data[at:at] = span
            case 4:
                members = bytes(data).split(b",")
                chance.shuffle(members)
                data = bytearray(b",".join(members))
            case 5:
                data[at:at] = bytes([chance.choice(_MARKS)])
            case _:
                data[at:at] = chance.choice(
                    [b"9" * 30, b"[" * 70, b'"a":1,', b"\\u001f", b"\\u000a", b"\xed\xa0\x80", b"1.5"]
                )
        if not data:
            return b"{}"
    return bytes(data).replace(b"\n", b" ")


def corpus() -> list[bytes]:
    """Return lines of every shape that the C code knows."""
    whole = [
        placed(event={"path": "/etc/ld.so.cache", "result": -3, "type": "file_open"}, ts_ns=4706008623267),
        placed(event={"argv": ["sh", "-c", 'a\n\t"b"\\'], "ok": True, "none": None, "no": False}),
        placed(event={"path": "/\u00fc\u20ac\U0001f600/\x01\x1f\x7f"}, addr=2**64 - 1, big=10**40),
        placed(run="r\u00fcn\n", boot_id='b\u00f6"ot', lane=3, seq=10**17),
        placed(event=[[[[]], {}, {"": {"a": []}}]], lane=4, seq=10**11),
        line(NODE, 7, 1)[:-1],
        b"{}",
        b'{"a":1.5,"b":1e3}',
    ]
    return [*whole, placed(a="x" * 300), placed(**{f"k{n:03d}": n for n in range(40)})]


def test_lines_of_the_usual_kind_are_vouched_for() -> None:
    """Without that the check would be right, and slow."""
    assert all(vouched(text) is not None and vouched(text) == judged(text) for text in corpus()[:6])


def compare(texts: list[bytes]) -> int:
    """Hold C and Python against each other over many lines; return how many C vouched for."""
    data = b"".join(text + b"\n" for text in texts)
    table = checker().table()
    assert table is not None
    room = (native_lines.c_uint8 * len(data)).from_buffer_copy(data)
    places = (Place * len(texts))()
    assert (len(texts), len(data)) == table.place(native_lines.ctypes.addressof(room), len(data), places)
    taken = 0
    for text, place in zip(texts, places, strict=True):
        if place.lane != UNSURE:
            taken += 1
            assert (place.lane, place.seq) == judged(text), text
    return taken


def test_many_mutated_lines_are_never_vouched_for_wrongly() -> None:
    """Twenty thousand changes: what C takes, Python takes; and a good part is still taken."""
    chance = random.Random(8)
    assert compare([mutated(chance.choice(corpus()), chance) for _ in range(20_000)]) > 1000


def test_every_escape_and_every_byte_is_known() -> None:
    """All short escapes and \\u00xx, in both cases of the digits; all bytes alone and in pairs, lone and in a row."""
    inside = [b"\\" + bytes([n]) for n in range(256)]
    inside += [form % n for n in range(256) for form in (b"\\u%04x", b"\\u%04X")]
    inside += [bytes([n]) for n in range(256)]
    edges = (0x00, 0x22, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xFF)
    leads = (*range(0xBE, 0x100), 0x41)
    inside += [bytes([a, b]) for a in leads for b in edges]
    inside += [bytes([a, b, c]) for a in leads for b in edges for c in edges]
    inside += [
        bytes([a, b, c, d]) for a in leads for b in edges for c in (0x7F, 0x80, 0xBF) for d in (0x22, 0x80, 0xC0)
    ]
    line_with = placed(event="?").replace(b'"?"', b'"before %b"')
    texts = [
        line_with.replace(b"%b", before + part) for part in inside if b"\n" not in part for before in (b"", b"1234567")
    ]
    # 7 short escapes, 27 long ones (a..f in lower case), and the plain bytes at the least.
    assert compare(texts) > 2 * (7 + 27 + 93)


@pytest.mark.parametrize(
    "event",
    ["-0", "01", "1.0", "1e3", "+1", "1 ", '"\\u0041"', '"\\/"', '"\\u000a"', '"\\u001F"', '"\t"', '"\xff"',
     '{"b":1,"a":2}', '{"a":1,"a":1}', '{"a":1,}', "[1,]", "[1 ,2]", "tru", "nul", "NaN", "1]", '{"a" :1}',
     "[" * 70 + "]" * 70, '"\xed\xa0\x80"', '"\xc0\x80"', '"\xf4\x90\x80\x80"', '"\xe0\x80\x80"', "9" * 4097],
)  # fmt: skip
def test_what_is_not_plain_is_left_to_python(event: str) -> None:
    """Each odd form on its own."""
    text = placed(event=0).replace(b'"event":0', b'"event":' + event.encode("latin-1"))
    assert vouched(text) is None


def faults_and_digest(path: Path, reader: ChunkReader, made: LineChecker) -> tuple[object, object]:
    digest = reader.read(path, made)
    return digest, made.finish()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.lists(st.integers(0, 11), max_size=12), st.booleans(), st.randoms(use_true_random=False))
def test_blocks_may_end_anywhere(
    tmp_path_factory: pytest.TempPathFactory, size: int, picks: list[int], whole: bool, chance: random.Random
) -> None:
    """C and Python give one digest, one Merkle root and the same faults, whatever the size of a block."""
    path = tmp_path_factory.getbasetemp() / "blocks.ndjson.zst"
    texts = [corpus()[n] if n < 10 else mutated(corpus()[n - 10], chance) for n in picks]
    data = b"\n".join(texts) + (b"\n" if whole and texts else b"")
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(4)))
    path.write_bytes(b"".join(pack(data[a:b]) for a, b in pairwise([0, *cuts, len(data)])))
    with ChunkReader(block_bytes=size) as quick, ChunkReader(native=False, block_bytes=size) as slow:
        expected = faults_and_digest(path, slow, LineChecker(ledger(), NODE))
        assert expected == faults_and_digest(path, quick, LineChecker(ledger(), NODE))
        assert expected[0] == quick.read(path)
    tree = merkle.Frontier()
    tree.add(merkle.leaves(data.split(b"\n")[:-1]))
    complete = not data or data.endswith(b"\n")
    digest = sha256(path.read_bytes()).hexdigest()
    assert lines.Digest(len(data), tree.size, digest, tree.root().hex(), complete) == expected[0]


@pytest.mark.parametrize("native", [True, False])
def test_empty_lines_beyond_the_room_of_a_block_are_all_judged(tmp_path: Path, native: bool) -> None:
    """A block of nothing but newlines has more lines than there is room for."""
    path = tmp_path / "newlines"
    path.write_bytes(pack(b"\n" * 30_000))
    made = LineChecker(ledger(), NODE)
    with ChunkReader(native=native) as reader:
        digest = reader.read(path, made)
    assert (30_000, "line 1: Input data was truncated") == (digest.lines, made.finish()[0].message)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("end", [b"", b"\n", b"\nx\n"])
def test_a_line_over_the_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, end: bytes
) -> None:
    """Exactly: the longest line passes, one byte more does not, wherever blocks end."""
    monkeypatch.setattr(chunk_reader, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "long"
    for block in (1, 64, 999, 1000):
        with ChunkReader(native=native, block_bytes=block) as reader:
            path.write_bytes(pack(b"a\n" + b"x" * 1000 + end))
            reader.read(path)
            path.write_bytes(pack(b"a\n" + b"x" * 1001 + end))
            with pytest.raises(ValueError, match="line 2 is over 1000 bytes"):
                reader.read(path)


def lines_of(lane: int, numbers: list[int]) -> bytes:
    return b"".join(line(NODE, lane, number) for number in numbers)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("lane", "row", "numbers", "said"),
    [
        (0, LaneRow(0, 2, 6, 4, 0, 0), [2, 3, 4, 5], None),
        (0, LaneRow(0, 2, 6, 5, 0, 0), [2, 5, 3, 5, 3], "lane 0 seq 3 is recorded twice"),
        (0, LaneRow(0, 0, 10**15, 4, 0, 0), [7, 10**14, 9, 7], "lane 0 seq 7 is recorded twice"),
        (0, LaneRow(0, 0, 10**15, 3, 0, 0), [7, 10**14, 9], None),
        (0, LaneRow(0, 2, 6, 3, 0, 1), [2, 3], "lane 0: 3 recorded, but 2 lines are here"),
        (0, LaneRow(0, 2, 6, 1, 0, 3), [6], "line 1: lane 0 seq 6 is outside [2, 6)"),
        (3, LaneRow(3, 2, 6, 4, 0, 0), [1, 9, 2**63, 2**64 - 1], None),
        (3, LaneRow(3, 2, 6, 4, 0, 0), [4, 9, 4, 9], "lane 3 seq 4 is recorded twice"),
        (3, LaneRow(3, 2, 6, 4, 0, 0), [4, 1, 5, 1], "lane 3 seq 1 is recorded twice"),
        (3, LaneRow(3, 2, 6, 1, 0, 3), [2**64], f"line 1: lane 3 seq {2**64} is outside [2, 6)"),
        (3, LaneRow(3, 2, 6, 1, 0, 3), [-1], "line 1: lane 3 seq -1 is outside [2, 6)"),
        (0, LaneRow(0, -2, 6, 1, 0, 7), [-1], "line 1: lane 0 seq -1 is outside [-2, 6)"),
    ],
)
def test_numbers_are_counted_exactly(
    tmp_path: Path, *, native: bool, lane: int, row: LaneRow, numbers: list[int], said: str | None
) -> None:
    """Dense and sparse lanes, numbers out of order, beyond the range and beyond 64 bits."""
    path = tmp_path / "chunk"
    path.write_bytes(b"".join(
        msgspec.json.encode({"boot_id": BOOT, "lane": lane, "node": NODE, "run": RUN, "seq": n}, order="sorted") + b"\n"
        for n in numbers
    ))  # fmt: skip
    path.write_bytes(pack(path.read_bytes()))
    made = LineChecker(ledger({RUN: BOOT}, [row]), NODE)
    with ChunkReader(native=native) as reader:
        reader.read(path, made)
    faults = made.finish()
    assert (said is None) == (not faults)
    assert said is None or faults[0].message.endswith(said)


def test_a_ledgers_claims_take_no_memory(tmp_path: Path) -> None:
    """Room for numbers follows the size of the chunk, not what its ledger says."""
    made = LineChecker(ledger({RUN: BOOT}, [LaneRow(n, 0, 2**50, 2**50, 0, 0) for n in range(0, 4000, 4)]), NODE)
    made.numbers.expect(1 << 20)
    assert len(made.numbers._bits) <= (1 << 18) + (64 << 10)


def test_memory_does_not_grow_with_the_chunk(tmp_path: Path) -> None:
    """A chunk of 48 MB takes at most 4 MiB more than one of 6 MB, its numbers among them."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_lines as t\n"
        "with t.ChunkReader() as reader:\n"
        "    made = t.LineChecker(t.ledger({t.RUN: t.BOOT}, [t.LaneRow(0, 0, 400_000, 400_000, 0, 0)]), t.NODE)\n"
        "    digest = reader.read(Path(sys.argv[1]), made)\n"
        "assert made.finish() == [] or digest.lines < 400_000, made.finish()\n"
        # Not ru_maxrss: that counts what the parent had.
        "print(*[row.split()[1] for row in open('/proc/self/status') if row.startswith('VmHWM')])\n"
    )
    path = tmp_path / "chunk"
    template = placed(seq=0).replace(b'"seq":0', b'"seq":%d')
    peaks = []
    for count in (50_000, 400_000):
        path.write_bytes(
            b"".join(
                pack(b"".join(template % n + b"\n" for n in range(begin, begin + 2000)))
                for begin in range(0, count, 2000)
            )
        )
        done = subprocess.run(
            [sys.executable, "-c", program, path, HERE], capture_output=True, text=True, check=True, timeout=60
        )
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 4096


def test_many_runs_are_told_apart(tmp_path: Path) -> None:
    """Each line is counted in the lane of its own run."""
    runs = {f"{n:016x}"[: 5 + n % 12]: BOOT for n in range(1, 3000, 7)}
    made = LineChecker(ledger(runs), NODE)
    path = tmp_path / "chunk"
    path.write_bytes(pack(b"".join(line(NODE, 0, 5, run) for run in runs)))
    with ChunkReader() as reader:
        reader.read(path, made)
    assert {1} == {made.numbers.count(made._lanes[run, 0]) for run in runs}


def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    """A hundred thousand changed inputs, each in a buffer of exactly its length."""
    program, listed = tmp_path / "fuzz", tmp_path / "corpus"
    listed.write_bytes(b"".join(text + b"\n" for text in corpus()))
    flags = ["-O1", "-g", "-Wall", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{C_SOURCE.parent}"]
    subprocess.run(["cc", *flags, HERE / "fuzz_lines.c", "-o", program], check=True, timeout=60)
    done = subprocess.run([program, listed, "100000", "7"], capture_output=True, timeout=60, check=False)
    assert (0, b"") == (done.returncode, done.stderr)
    # Most changes are small enough that whole lines are left beside them.
    assert int(done.stdout.split()[0]) > 10_000
