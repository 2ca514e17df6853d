"""Watched functions on the real kernel: which calls are recorded, by which names, in which files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stella_collector import kernel
from stella_collector.accounting import decode_counters
from stella_collector.binaries import file_probes
from stella_collector.objects import Program
from stella_shared.events import FunctionCall
from stella_shared.kernel_records import PROCESS_EXEC
from tests.collector.conftest import Watch
from tests.collector.functions_kit import CALLER, build_id_of, calls, compiled, entry, heeding, offset_of, wait_for

pytestmark = pytest.mark.kernel
Start = Callable[..., Watch]


#: The other probes take the kernel long to detach.
ALONE = {
    f"probes__{name}": False
    for name in (
        "sys_enter_openat", "inet_sock_set_state", "libc_connect", "libc_accept", "openssl_read", "openssl_write",
    )
}  # fmt: skip


def run(watch: Watch, *command: str | Path) -> int:
    """Run a caller in the watched cgroup to its end; return its pid."""
    process = watch.cgroup.run(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.communicate(b"go\n", timeout=60)
    assert 0 == process.returncode
    return process.pid


@pytest.mark.parametrize("mode", ["trace", "count"])
def test_every_call_is_there_and_counted_exactly(watch: Start, tmp_path: Path, mode: str) -> None:
    """Four threads, a known number of calls: their sum is exact; file, build-id, offset and name are nm's."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(**ALONE, probes__functions=[entry(program, "first", "sec*", mode=mode)], ring_buffer_size=1 << 22)
    pid = run(w, program, "500", "4")
    seen = w.finish()
    found = seen.events(FunctionCall)
    assert Counter({"first": 2000, "second": 1}) == calls(found)
    assert {} == seen.ledger.lost
    build_id, offsets = build_id_of(program), {name: offset_of(program, name) for name in ("first", "second")}
    (started,) = {
        (r.tgid, r.start_ns, r.program) for r in seen.records if r.type == PROCESS_EXEC and r.comm == b"caller"
    }
    for record, event in zip(seen.records, seen.events(), strict=True):
        if isinstance(event, FunctionCall):
            assert started == (record.tgid, record.start_ns, record.program), "the same process as in all its events"
            assert (str(program), build_id) == (event.binary, event.build_id)
            assert offsets[event.symbol] == event.offset
            assert (pid, b"caller", 0) == (record.tgid, record.comm, record.uid)
            if mode == "count":
                assert event.first_ns and event.first_ns <= (event.last_ns or 0) <= record.ts_ns
    if mode == "count":
        assert 2 == len(found)


def test_the_stack_begins_with_the_function(watch: Start, tmp_path: Path) -> None:
    """Frame 0 is the function by build-id and offset; its caller follows. `stack: false` leaves it out."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread", "-fno-omit-frame-pointer")
    w = watch(**ALONE, probes__functions=[entry(program, "first"), entry(program, "second", stack=False)])
    run(w, program, "3")
    found = w.finish().events(FunctionCall)
    assert 4 == len(found)
    for event in found:
        if event.symbol == "second":
            assert event.stack is None
        else:
            assert event.stack and (event.build_id, event.offset) == (event.stack[0].build_id, event.stack[0].offset)
            assert event.build_id == event.stack[1].build_id, "called from the same file"


def test_names_of_cplusplus_match_in_three_forms(watch: Start, tmp_path: Path) -> None:
    """Mangled, demangled, and demangled without arguments; one probe for two names of one place."""
    source = """
namespace app {
template <class T> struct Box { __attribute__((noinline)) T get(T v) const { asm volatile(""); return v; } };
__attribute__((noinline)) int by_args(int a, char) { asm volatile(""); return a; }
__attribute__((noinline)) int mangled(long a) { asm volatile(""); return int(a); } }
extern "C" { __attribute__((noinline)) int plain(int a) { asm volatile(""); return a + 1; }
int alias(int) __attribute__((alias("plain"))); }
int main() { return app::Box<int>().get(0) + app::by_args(0, 'x') + app::mangled(0) + alias(-1); }
"""
    program = compiled(tmp_path, "names", source, compiler="g++")
    wanted = ["app::Box<int>::get*", "app::by_args", "_ZN3app7mangledEl", "plain", "alias"]
    w = watch(**ALONE, probes__functions=[entry(program, *wanted)])
    run(w, program)
    assert {"_ZNK3app3BoxIiE3getEi": 1, "_ZN3app7by_argsEic": 1, "_ZN3app7mangledEl": 1, "alias": 1} == calls(
        w.finish().events(FunctionCall)
    )
    (state,) = w.kernel.binaries.states()
    assert (4, "") == (state.functions, state.reason)


def test_resolvers_and_cold_parts_are_no_functions(watch: Start, tmp_path: Path) -> None:
    """An IFUNC's symbol is its resolver and a cold part is jumped into: left out, and counted."""
    source = """
static int real(void) { return 0; }
static int (*choose(void))(void) { return real; }
int chosen(void) __attribute__((ifunc("choose")));
__attribute__((cold, noinline)) static void rare(int n) { __asm__ volatile("" :: "r"(n)); }
__attribute__((noinline)) int parted(int n) { if (__builtin_expect(n > 100, 0)) { rare(n); rare(n + 1); } return n; }
int main(int argc, char **argv) { return chosen() + parted(argc) - 1; }
"""
    program = compiled(tmp_path, "odd", source, "-O2", "-freorder-blocks-and-partition")
    w = watch(**ALONE, probes__functions=[entry(program, "chosen", "parted*", mode="count")])
    run(w, program)
    assert Counter({"parted": 1}) == calls(w.finish().events(FunctionCall))
    (state,) = w.kernel.binaries.states()
    assert 1 == state.skipped["ifunc"]
    assert 1 == state.functions


def test_an_opened_library_is_found_at_once(watch: Start, tmp_path: Path) -> None:
    """dlopen(3) of a library nobody has run before: it is attached while the program runs on, and then exactly."""
    library = compiled(tmp_path, "libplug.so", "int plugged(int n) { return n + 1; }", "-shared", "-fPIC")
    source = f"""
#include <dlfcn.h>
#include <stdio.h>
int main(void) {{ int (*f)(int) = (int (*)(int))dlsym(dlopen("{library}", RTLD_NOW), "plugged");
getchar(); for (int i = 0; i < 7; i++) f(i); return 0; }}
"""
    program = compiled(tmp_path, "opener", source)
    w = watch(**ALONE, probes__functions=[entry(f"{tmp_path}/**/libplug.so", "plugged")])
    with heeding(w):
        process = w.cgroup.run(program, stdin=subprocess.PIPE)
        wait_for(lambda: any(state.functions for state in w.kernel.binaries.states()))
        process.communicate(b"go\n", timeout=10)
    assert {"plugged": 7} == calls(w.finish().events(FunctionCall))
    assert w.kernel.binaries.delays_us


def test_a_short_program_is_seen_from_its_first_call(watch: Start, tmp_path: Path) -> None:
    """Once a file was met, each later process is seen from its begin, be it as short as can be."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(**ALONE, probes__functions=[entry(f"{tmp_path}/**", "first", mode="count")])
    with heeding(w):
        first = w.cgroup.run(program, "1", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_for(lambda: any(state.functions for state in w.kernel.binaries.states()))
        first.communicate(b"", timeout=10)
        for _ in range(20):
            run(w, program, "3")
    found = w.finish().events(FunctionCall)
    assert {"first": 60} == calls(found)
    assert 20 == len(found), "each process has its own counter"


def test_a_binary_replaced_on_disk_is_attached_anew(watch: Start, tmp_path: Path) -> None:
    """Another file under the same name, and other bytes in the same file: new build-id, new digest, right counts."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    other = compiled(tmp_path, "other", CALLER.replace("n + 1", "n * 3 + 7 * n * n"), "-pthread", "-O0")
    w = watch(**ALONE, probes__functions=[entry(program, "first", mode="count")])
    run(w, program, "5")
    digests = {state.sha256 for state in w.kernel.binaries.states()}
    shutil.copy(other, tmp_path / "new")
    (tmp_path / "new").rename(program)
    w.kernel.binaries.recheck()
    run(w, program, "6")
    digests |= {state.sha256 for state in w.kernel.binaries.states()}
    with program.open("r+b") as file:
        file.write(compiled(tmp_path, "third", CALLER, "-pthread", "-O2").read_bytes())
        file.truncate()
    w.kernel.binaries.recheck()
    run(w, program, "7")
    found = w.finish().events(FunctionCall)
    assert {"first": 18} == calls(found)
    assert [5, 6, 7] == [event.count for event in sorted(found, key=lambda e: e.first_ns or 0)]
    assert 3 == len({event.build_id for event in found})
    digests |= {state.sha256 for state in w.kernel.binaries.states()}
    assert hashlib.sha256(program.read_bytes()).hexdigest() in digests
    assert 3 == len(digests)


def test_a_build_id_names_a_file_wherever_it_lies(watch: Start, tmp_path: Path) -> None:
    """`build-id:` finds the program under any path, and no other program."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    copy = tmp_path / "renamed"
    shutil.copy(program, copy)
    other = compiled(tmp_path, "other", CALLER, "-pthread", "-O0")
    w = watch(**ALONE, probes__functions=[entry(f"build-id:{build_id_of(program)}", "first", mode="count")])
    with heeding(w):
        for path in (other, copy):
            process = w.cgroup.run(path, "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if path is copy:
                wait_for(lambda: any(state.functions for state in w.kernel.binaries.states()))
            process.communicate(b"go\n", timeout=10)
    found = w.finish().events(FunctionCall)
    assert [(str(copy), 4)] == [(event.binary, event.count) for event in found]


def test_a_file_that_lies_costs_its_reader_and_nobody_else(watch: Start, tmp_path: Path) -> None:
    """Sections without end, tables beyond the file, no ELF at all: a reason each, and the next file is watched."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    whole = program.read_bytes()
    sections = int.from_bytes(whole[0x28:0x30], "little")
    (tmp_path / "lie-sections").write_bytes(whole[:0x3C] + b"\xff\xff" + whole[0x3E:])
    huge = bytearray(whole)
    for at in range(sections, len(huge) - 64, 64):
        huge[at + 32 : at + 40] = (1 << 62).to_bytes(8, "little")
    (tmp_path / "lie-sizes").write_bytes(huge)
    (tmp_path / "lie-text").write_bytes(b"#!/bin/sh\n" * 50)
    w = watch(**ALONE, probes__functions=[entry(f"{tmp_path}/lie-*", "*"), entry(program, "first", mode="count")])
    run(w, program, "9")
    assert {"first": 9} == calls(w.finish().events(FunctionCall))
    reasons = {state.binary.rpartition("/")[2]: state.reason for state in w.kernel.binaries.states()}
    assert all(reasons[name] for name in ("lie-sections", "lie-sizes", "lie-text"))
    assert not reasons["caller"]


def test_too_many_functions_are_refused_by_number(
    watch: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that matches more than are left is not attached in part: it says how many, and the others go on."""
    monkeypatch.setattr(kernel, "FUNCTIONS_MAX", 100)
    monkeypatch.setattr(file_probes, "FUNCTIONS_MAX", 100)
    names = "\n".join(f"int many_{i}(void) {{ return {i}; }}" for i in range(101))
    library = compiled(tmp_path, "many.so", names, "-shared", "-fPIC", "-O0")
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(**ALONE, probes__functions=[entry(library, "many_*"), entry(program, "first", mode="count")])
    run(w, program, "2")
    assert {"first": 2} == calls(w.finish().events(FunctionCall))
    reasons = {state.binary: state.reason for state in w.kernel.binaries.states()}
    assert "101 functions match, and 100 of 100 are left" == reasons[str(library)]


def test_counters_that_find_no_room_lose_nothing(watch: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one counter the other calls become records of their own; with a tiny ring counters wait."""
    monkeypatch.setattr(kernel, "COUNTERS_MAX", 4)
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(
        **ALONE,
        probes__functions=[entry(program, "first", "second", "main", mode="count", stack=False)],
        ring_buffer_size=os.sysconf("SC_PAGESIZE"),
    )
    for _ in range(8):
        run(w, program, "4")
        w.drain()
    seen = w.finish()
    assert {"first": 32, "second": 8, "main": 8} == calls(seen.events(FunctionCall))
    assert {} == seen.ledger.lost


def test_counters_of_processes_that_have_ended_go(watch: Start, tmp_path: Path) -> None:
    """What a process counted is written once it has ended, and two flushes later its counters are free again."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(**ALONE, probes__functions=[entry(program, "first", mode="count")])
    for _ in range(3):
        run(w, program, "2")

    def counters() -> tuple[int, int]:
        obj = w.kernel._object
        return obj.entries("stella_counts", 56), obj.entries("stella_counted", 16)

    before = counters()
    for _ in range(3):
        w.kernel.binaries.flush()
    assert ((3, 3), (0, 0)) == (before, counters())
    assert {"first": 6} == calls(w.finish().events(FunctionCall))


def test_counters_are_read_while_they_count(watch: Start, tmp_path: Path) -> None:
    """Four threads count as fast as they can while counters are cleared again and again: the sum is exact."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(
        **{**ALONE, "probes__sched_process_exec": False},
        probes__functions=[entry(program, "first", mode="count")],
        ring_buffer_size=1 << 20,
    )
    process = w.cgroup.run(program, "12500", "4", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.close()
    while process.poll() is None:
        w.kernel.binaries.flush()
        w.drain()
    assert process.stdout
    process.stdout.close()
    seen = w.finish()
    found = seen.events(FunctionCall)
    assert 50_000 == sum(event.count or 0 for event in found)
    assert len(found) > 5
    assert len(found) == len({(record.lane, record.seq) for record in seen.records})
    assert {} == seen.ledger.lost


def test_what_is_counted_and_not_written_has_its_number(watch: Start, tmp_path: Path) -> None:
    """A collector that is killed leaves counters behind: each is a number that was handed out and never arrives."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(
        **{**ALONE, "probes__sched_process_exec": False},
        probes__functions=[entry(program, "first", "second", mode="count")],
    )
    for _ in range(3):
        run(w, program, "50", "4")
    handed_out = sum(counters.taken for counters in decode_counters(w.kernel.counters()))
    assert (6, 0) == (handed_out, w.kernel.ring.waiting())
    seen = w.finish()
    assert {"first": 600, "second": 3} == calls(seen.events(FunctionCall))
    assert 6 == len({(record.lane, record.seq) for record in seen.records})
    assert {} == seen.ledger.lost


def test_without_links_of_many_probes_single_ones_do(
    watch: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a kernel before 6.6 each function has a link of its own, up to a bound that is told."""
    monkeypatch.setattr(Program, "takes_uprobe_multi", lambda _: False)
    names = "\n".join(f"int f{i}(void) {{ return {i}; }}" for i in range(257))
    library = compiled(tmp_path, "many.so", names, "-shared", "-fPIC", "-O0")
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(
        **ALONE,
        probes__functions=[entry(library, "f*"), entry(program, "first"), entry(program, "second", mode="count")],
    )
    run(w, program, "3")
    assert {"first": 3, "second": 1} == calls(w.finish().events(FunctionCall))
    reasons = {state.binary: state.reason for state in w.kernel.binaries.states() if not state.functions}
    assert "more than 256" in reasons[str(library)]


def go_program() -> Path | None:
    """Return a program of Go's compiler on this machine that has its table of symbols."""
    for name in ("docker", "dockerd", "containerd", "go"):
        path = shutil.which(name)
        said = subprocess.run(["nm", path], capture_output=True, check=False).stdout if path else b""
        if path and re.search(rb" [tT] main\.main\n", said):
            return Path(path).resolve()
    return None


def test_a_go_program_can_be_watched(watch: Start) -> None:
    """Entry probes on Go's own functions; the program runs on as ever, and gets no return probe."""
    program = go_program()
    if program is None:
        pytest.skip("no program of Go's compiler with a table of symbols is installed")
    w = watch(
        **{**ALONE, "probes__openssl_read": True},
        probes__functions=[entry(program, "main.main", "runtime.goexit*", mode="count")],
    )
    done = w.cgroup.run(program, "--version", stdout=subprocess.PIPE)
    out, _ = done.communicate(timeout=30)
    assert 0 == done.returncode and out
    assert 1 == calls(w.finish().events(FunctionCall))["main.main"]
    assert not any(state.mode == "openssl_read" and state.functions for state in w.kernel.binaries.states())


def test_a_file_of_a_process_that_is_gone_is_found_by_the_kernels_path(watch: Start, tmp_path: Path) -> None:
    """A program that ends before anybody looks at it is attached all the same, for the next one."""
    program = compiled(tmp_path, "caller", CALLER, "-pthread")
    w = watch(**ALONE, probes__functions=[entry(f"{tmp_path}/**", "first", mode="count")])
    assert 0 == w.cgroup.run(program, "1", stdin=subprocess.DEVNULL).wait(timeout=10)
    assert w.kernel.binaries.look_at_notices()
    run(w, program, "8")
    assert {"first": 8} == calls(w.finish().events(FunctionCall))
