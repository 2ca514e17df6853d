"""What is asked of a file and what is believed of the answer; names without arguments; files found by a glob."""

from __future__ import annotations

import hashlib
import io
import platform
import random
from pathlib import Path

import msgspec
import pytest

from stella_collector.binaries import elf, mapped
from stella_collector.binaries.choosing import Chooser, Library
from stella_collector.binaries.elf import without_arguments
from stella_collector.binaries.question import Answer, Function, Matched, Patterns, Question, checked, table_sha256
from stella_shared.config import Probes, Signals, WatchedFunctions
from stella_shared.errors import BrokenPromise
from tests.collector.functions_kit import compiled

QUESTION = Question([Patterns(0, ["*"]), Patterns(2, ["*"])], ["SSL_read"], 3)


def answered(answer: Answer) -> Answer:
    """Return what is believed of an answer about a file of 1,000 bytes."""
    return checked(msgspec.msgpack.encode(answer), QUESTION, 1000)


def test_an_honest_answer_is_believed() -> None:
    """Sorted offsets within the file, each once, of entries that were asked about."""
    answer = Answer(
        build_id="ab" * 20,
        matched=[Matched(0, 2, [Function(8, b"a", 1), Function(9, b"b", 300)]), Matched(2, 1, [Function(1, b"c", 1)])],
        named={"SSL_read": 16},
    )
    assert answer == answered(answer)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(matched=[Matched(1, 1, [Function(8, b"a", 1)])]),
        Answer(matched=[Matched(0, 2, [Function(9, b"a", 1), Function(8, b"b", 1)])]),
        Answer(matched=[Matched(0, 2, [Function(8, b"a", 1), Function(8, b"b", 1)])]),
        Answer(matched=[Matched(0, 1, [Function(8, b"a", 1)]), Matched(2, 1, [Function(8, b"b", 1)])]),
        Answer(matched=[Matched(0, 1, [Function(1000, b"a", 1)])]),
        Answer(matched=[Matched(0, 4, [Function(i, b"a", 1) for i in range(4)])]),
        Answer(matched=[Matched(0, 1, [Function(8, b"", 0)])]),
        Answer(matched=[Matched(0, 1, [Function(8, b"a\0b", 3)])]),
        Answer(matched=[Matched(0, 1, [Function(8, b"a" * 201, 201)])]),
        Answer(matched=[Matched(0, 1, [Function(8, b"abc", 2)])]),
        Answer(matched=[Matched(0, 0, [])] * 3),
        Answer(named={"SSL_write": 16}),
        Answer(named={"SSL_read": 1000}),
        Answer(build_id="a" * 65),
    ],
)
def test_an_answer_that_cannot_be_is_refused(answer: Answer) -> None:
    """Whoever has taken the reading process over cannot make the collector believe it."""
    with pytest.raises(BrokenPromise):
        answered(answer)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x81\xa6reason\x01", b"\x91" * 5000])
def test_bytes_that_are_no_answer_are_refused(data: bytes) -> None:
    """Whatever they are."""
    with pytest.raises(BrokenPromise):
        checked(data, QUESTION, 1000)


def test_the_table_has_one_digest() -> None:
    """Offset, space, name, newline, for each function: as docs/evidence-format.md says."""
    assert hashlib.sha256(b"16 f\n20 g\n").hexdigest() == table_sha256([Function(16, b"f", 1), Function(20, b"g", 1)])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("f(int)", "f"),
        ("f", "f"),
        ("a::b<c>::d(int, e<f>) const", "a::b<c>::d"),
        ("(anonymous namespace)::f()", "(anonymous namespace)::f"),
        ("a::operator()(int) const", "a::operator()"),
        ("a::operator<(a const&)", "a::operator<"),
        ("a::operator->()", "a::operator->"),
        ("bool a::operator<< <int>(b)", "bool a::operator<< <int>"),
        ("a<(b)1>::c()", "a<(b)1>::c"),
    ],
)
def test_a_name_ends_where_its_arguments_begin(name: str, short: str) -> None:
    """Operators and template arguments have brackets of their own."""
    assert short.encode() == without_arguments(name.encode())


def test_any_bytes_are_a_file_or_no_file(tmp_path: Path) -> None:
    """A program with bytes changed at random gives an answer or one of the refusals, never anything else."""
    drawn = random.Random(7)
    program = compiled(tmp_path, "small", "int f(void) { return 1; }\nint main(void) { return f(); }")
    whole = program.read_bytes()
    question = Question([Patterns(0, ["*"])], ["f"], 1000)
    answers = refusals = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(drawn.randrange(1, 12)):
            # Headers and tables are at both ends.
            at = drawn.choice([drawn.randrange(1024), drawn.randrange(len(data) - 4096, len(data))])
            data[at] = drawn.randrange(256)
        try:
            found = elf.answer(io.BytesIO(bytes(data)), question, platform.machine())
            checked(msgspec.msgpack.encode(found), question, len(data))
            answers += 1
        except elf.REFUSALS:
            refusals += 1
    assert answers and refusals


def test_what_a_file_is_wanted_for() -> None:
    """By path, by build-id, as a library, as a program; `image` leaves the node's own files and other images alone."""
    entries = [
        WatchedFunctions(binary="/opt/**", functions=["f"]),
        WatchedFunctions(binary="build-id:abcd", functions=["f"]),
        WatchedFunctions(binary="/opt/**", functions=["f"], image="nginx*"),
    ]
    tls = Library("openssl_read", "libssl", (("a", "b", "SSL_read"),))
    chooser = Chooser(Signals(probes=Probes(functions=entries, openssl_libraries=["/opt/x"])), [tls])

    def wanted(path: str, *globs: str, own: bool, is_program: bool = False) -> tuple[list[int], bool]:
        found = chooser.interest([path], own=own, is_program=is_program, globs=globs)
        return [entry.number for entry in found.entries], bool(found.libraries)

    assert ([0, 1], False) == wanted("/opt/y", own=True)
    assert ([0, 1], False) == wanted("/opt/y", "nginx*", own=True)
    assert ([0, 1], False) == wanted("/opt/y", own=False)
    assert ([0, 1, 2], False) == wanted("/opt/y", "nginx*", own=False)
    assert ([1], True) == wanted("/usr/lib/libssl.so.3", own=True)
    assert ([0, 1], True) == wanted("/opt/x", own=True)
    assert ([1], True) == wanted("/bin/y", own=False, is_program=True)


def test_a_file_waits_for_containers_of_the_images_that_mean_it() -> None:
    """It is known which containers are new to an image, and for which images a file is to be looked at again."""
    entries = [
        WatchedFunctions(binary="/opt/**", functions=["f"], image="web*"),
        WatchedFunctions(binary="/opt/**", functions=["g"], image="db"),
        WatchedFunctions(binary="build-id:abcd", functions=["f"], image="any"),
    ]
    chooser = Chooser(Signals(probes=Probes(functions=entries)), [])
    assert {"1", "2"} == chooser.select({"web*": frozenset("1"), "db": frozenset("12"), "not asked": frozenset("9")})
    assert frozenset() == chooser.select({"web*": frozenset("1"), "db": frozenset("2")})
    assert {"1"} == chooser.select({"web*": frozenset("1"), "db": frozenset("12")})
    assert ({"web*", "db"}, {"db"}, frozenset()) == tuple(map(chooser.globs_of, ("1", "2", "")))

    def waits_for(path: str, *globs: str, build_id: str = "", own: bool = False) -> set[str]:
        return set(chooser.interest([path], own=own, is_program=True, globs=globs).waits_for(build_id))

    assert {"web*", "db", "any"} == waits_for("/opt/x")
    assert {"web*", "any"} == waits_for("/opt/x", "db")
    assert {"web*", "db"} == waits_for("/opt/x", build_id="ef01")
    assert {"any"} == waits_for("/bin/x") == waits_for("/bin/x", build_id="abcd")
    assert set() == waits_for("/opt/x", own=True)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["0::/docker/{a}"], "a"),
        (["0::/system.slice/docker-{a}.scope"], "a"),
        (["0::/kubepods.slice/x.slice/cri-containerd-{a}.scope/{b}"], "a"),
        (["0::/../../crio-{a}"], "a"),
        (["0::/a.slice:cri-containerd:{a}"], "a"),
        (["0::/libpod_parent/{b}/libpod-{a}"], "a"),
        (["12:pids:/docker/{b}", "0::/docker/{a}"], "a"),
        (["12:cpu,pids:/docker/{a}", "3:memory:/docker/{b}", "0::/"], "a"),
        (["3:memory:/docker/{a}", "0::/user.slice"], ""),
        (["0::/machine.slice/libpod-conmon-{a}.scope"], ""),
        (["0::/docker/{a}0"], ""),
        (["nonsense", ""], ""),
    ],
)
def test_a_processes_container_is_its_outermost_cgroups(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], found: str
) -> None:
    """As the enricher names containers; cgroup v2 first, then the v1 hierarchy of the pids controller."""
    ids = {"a": "a1" * 32, "b": "b2" * 32}
    data = "\n".join(lines).format(**ids).encode()
    monkeypatch.setattr(mapped, "open", lambda *_: io.BytesIO(data), raising=False)
    assert ids.get(found, "") == mapped.container(1)


def test_a_glob_names_files_on_disk(tmp_path: Path) -> None:
    """Within bounds, files only, and nothing where any depth would have to be searched."""
    for name in ("a1", "a2", "b1"):
        (tmp_path / name).touch()
    (tmp_path / "a3").mkdir()
    assert [f"{tmp_path}/a1", f"{tmp_path}/a2"] == mapped.on_disk(f"{tmp_path}/a*", 10)
    assert [f"{tmp_path}/a1"] == mapped.on_disk(f"{tmp_path}/a*", 1)
    assert [f"{tmp_path}/b1"] == mapped.on_disk(f"{tmp_path}/b1", 10)
    assert [] == mapped.on_disk(f"{tmp_path}/**", 10)
