"""`stella signals symbolize`: names beside lines, on any machine, from files that were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.enricher import symbol_oracles as oracle

from stella_cli import symbolizing
from stella_shared.errors import BrokenPromise
from stella_shared.symbols import Question

LIBC = next(
    Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("libc.so.6")
)
BUILD_ID = oracle.build_id(LIBC)


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    """A folder as somebody carries it to another machine: the library, under a name that says nothing."""
    folder = tmp_path / "binaries"
    folder.mkdir()
    (folder / "from-the-node").write_bytes(LIBC.read_bytes())
    return folder


def offset(name: str) -> int:
    """Return where in libc's file a function begins."""
    begin = next(b for (b, _), names in oracle.functions(LIBC, dynamic=True).items() if name in names)
    found = oracle.offset_of(oracle.segments(LIBC), begin)
    assert found is not None
    return found


def line(*frames: dict[str, object]) -> bytes:
    """Return an evidence line with a stack, in an order of keys that is not ours."""
    return json.dumps({"z": 1, "event": {"type": "net_connect", "stack": list(frames)}, "a": [1.50]}).encode()


def run(tmp_path: Path, *arguments: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command without a node."""
    return subprocess.run(
        [sys.executable, "-m", "stella_cli", "signals", "symbolize", "--target", tmp_path / "none/evidence",
         *map(str, arguments)],
        input=data, capture_output=True, check=False, cwd=tmp_path, env={**os.environ, "STELLA_CONFIG": ""},
    )  # fmt: skip


def test_words_are_resolved_offline_from_a_given_folder(tmp_path: Path, binaries: Path) -> None:
    """BUILD_ID+OFFSET, hex or decimal, as arguments or on stdin; nothing is written anywhere."""
    words = [f"{BUILD_ID}+{offset('connect'):#x}", f"{BUILD_ID}+{offset('fflush') + 3}"]
    expected = f"{words[0]}  connect+0x0 (dynsym)\n{BUILD_ID}+{offset('fflush') + 3:#x}  fflush+0x3 (dynsym)\n"
    done = run(tmp_path, *words, "--debug-directory", binaries)
    assert (0, expected, b"") == (done.returncode, done.stdout.decode(), done.stderr)
    again = run(tmp_path, "-", "--debug-directory", binaries, data="\n".join(words).encode())
    assert expected == again.stdout.decode()
    assert [binaries] == list(tmp_path.iterdir())


def test_lines_stand_unchanged_beside_their_frames(tmp_path: Path, binaries: Path) -> None:
    """Each line comes out byte for byte, its frames behind it; in JSON the line is a text."""
    lines = [
        line({"build_id": BUILD_ID, "offset": offset("connect")}, {"symbol": "addr:0x7f12"}),
        line(),
        b'{"event":{"type":"file_open"}}',
        line({"build_id": "ee" * 20, "offset": 5}),
    ]
    file = tmp_path / "lines.ndjson"
    file.write_bytes(b"\n".join(lines) + b"\n")
    done = run(tmp_path, file, "--debug-directory", binaries)
    out = done.stdout.split(b"\n")
    assert 0 == done.returncode
    assert lines == [row for row in out if row.startswith(b"{")]
    assert f"  {BUILD_ID}+{offset('connect'):#x}  connect+0x0 (dynsym)".encode() == out[1]
    assert b"  addr:0x7f12  ? (no_build_id)" == out[2]
    assert f"  {'ee' * 20}+0x5  ? (no_file)".encode() == out[6]
    rows = [json.loads(row) for row in run(
        tmp_path, file, "--debug-directory", binaries, "--format", "json"
    ).stdout.splitlines()]  # fmt: skip
    assert lines == [row["line"].encode() for row in rows]
    frame = rows[0]["frames"][0]
    assert {
        "symbol": "connect",
        "symbol_offset": 0,
        "symbol_source": "dynsym",
        "libc": "glibc",
    }.items() <= frame.items()
    assert frame["symbolizer"].startswith("stella-symbols/1 ")
    assert "no_file" == rows[3]["frames"][0]["reason"]


def test_the_same_question_has_the_same_answer_everywhere(tmp_path: Path, binaries: Path) -> None:
    """Two folders, two copies, two processes: the same bytes."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "libc.so.6").write_bytes(LIBC.read_bytes())
    word = f"{BUILD_ID}+{offset('connect'):#x}"
    answers = {run(tmp_path, word, "--debug-directory", d, "--format", "json").stdout for d in (binaries, other)}
    assert 1 == len(answers)
    assert b"connect" in answers.pop()


def test_nothing_resolved_is_exit_code_1_with_the_reasons(tmp_path: Path) -> None:
    """Each frame says why; the summary counts the reasons."""
    done = run(tmp_path, "aa" * 20 + "+0x10", "bb" * 20 + "+1")
    assert 1 == done.returncode
    assert b"? (no_file)" in done.stdout
    assert b"nothing was resolved: no_file (2)" in done.stderr
    assert (1, b"") == ((empty := run(tmp_path, "-")).returncode, empty.stdout)


@pytest.mark.parametrize(
    ("arguments", "data", "code", "said"),
    [
        (["/nowhere.ndjson"], b"", 4, b"no file"),
        (["--debug-directory", "/nowhere", "-"], b"", 4, b"no directory"),
        (["-"], b"hello", 2, b"is no address"),
        (["-"], b'{"event":', 2, b"neither an evidence line"),
        (["-"], ("ab" * 20 + "+99999999999999999999").encode(), 2, b"is no address"),
        (["-"], b"abc+1", 2, b"is no address"),
    ],
)
def test_what_cannot_be_asked_is_said(
    tmp_path: Path, arguments: list[str], data: bytes, code: int, said: bytes
) -> None:
    """Wrong input ends the command with its code, naming what is wrong."""
    done = run(tmp_path, *arguments, data=data)
    assert code == done.returncode, done.stderr
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_resolver_that_talks_nonsense_and_stays_is_ended() -> None:
    """The command says so; it does not wait for a process that waits for it."""
    talk = "import sys; sys.stdin.readline(); print('nonsense', flush=True); sys.stdin.read()"
    resolver = symbolizing._Resolver([sys.executable, "-c", talk])
    try:
        with pytest.raises(BrokenPromise, match="the resolver ended with code -9"):
            resolver.ask(Question(BUILD_ID, 0))
    finally:
        resolver.close()
