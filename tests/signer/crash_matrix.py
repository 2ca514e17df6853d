"""Fails and kills the signer at every system call it makes on its files, and checks what the next life makes of it.

    make crash-matrix        every call; prints how many runs, and what failed

A first life under strace shows the calls: which system call, on which file of the node's folder, and the how many-th
of its kind there.  Then one life for each of them with that call failed (`EIO`, and `ENOSPC` where it asks for space),
and one killed as it enters the call.  To be killed after a call is to be killed before the next: that is covered too.
`close` is killed and not failed: strace leaves the descriptor open, which no kernel does.

After each run a life without a fault does the rest, and `check` looks: nothing told was lost, nothing is there twice.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.evidence.chain_maker import Node, one
from tests.signer import crash_driver
from tests.signer.crash_driver import NAME, batches
from tests.signer.log_kit import Surroundings, surroundings

from stella_shared.evidence import names
from stella_shared.evidence.compressed import frames_of
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.keys import load_trusted
from stella_shared.evidence.report import VALID_LOGGED
from stella_shared.evidence.verify import verify_chain
from stella_shared.evidence.vouching import Trust

ROOT: Final = Path(__file__).parents[2]
_SECONDS: Final = 60.0
_CALL: Final = re.compile(r"^(\d+) +(\w+)\((.*)$")
_PATH: Final = re.compile(r"[<\"](/[^>\"]*)")
#: Calls that change something, as the representative slice takes them.
CHANGES: Final = frozenset(
    {"openat", "write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "ftruncate", "unlink"}
    | {"unlinkat", "mkdir", "mkdirat", "flock"}
)
#: Calls that never ask for space.
_NO_SPACE_NEEDED: Final = frozenset(
    {"read", "pread64", "lseek", "fstat", "newfstatat", "stat", "lstat", "statx", "access", "getdents64", "ioctl"}
    | {"fcntl", "flock", "readlink", "unlink", "unlinkat"}
)


class Ends(Disk):
    """A disk on which a life ends before a certain step: makes the beginnings of the recovery scenarios."""

    def __init__(self, before: str) -> None:
        self._before = before

    def rename(self, old: Path, new: Path) -> None:
        """Rename, unless this is where it ends."""
        if new.name == self._before:
            raise KeyboardInterrupt
        super().rename(old, new)


def _torn(folder: Path) -> None:
    """Two commits, and a third that was being written to data and journal."""
    node = Node(folder, NAME)
    store = node.open()
    for batch in batches()[:2]:
        store.commit(*one(batch))
    store.release()
    for kind, torn in ((names.OPEN_DATA, b'{"torn":'), (names.OPEN_JOURNAL, b"\x40\0\0\0torn")):
        with node.file(2, kind).open("ab") as file:
            file.write(torn)


def _ends_before(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        try:
            crash_driver.live(folder, lambda what, **said: None, Ends(name))
        except KeyboardInterrupt:
            return
        raise AssertionError(f"{name} was never renamed into its place")

    return make


def _to_submit(folder: Path) -> None:
    """Two signed chunks and no bundle."""
    node = Node(folder, NAME)
    store = node.open()
    store.commit(*one(batches()[0]))
    store.close("size")
    store.release()


#: What lies in the folder before the script begins.
SCENARIOS: Final[dict[str, Callable[[Path], None]]] = {
    "life": lambda folder: None,
    "torn": _torn,
    "closing": _ends_before("000002.ndjson.zst"),
    "unsigned": _ends_before("000003.dsse.json"),
    "head-behind": _ends_before("head.json"),
    "submit": _to_submit,
}


@dataclass(frozen=True)
class Call:
    """The `nth` call of its kind that a thread makes on a file of the folder.

    `path` is the file's, from the folder on.  It is "" for a file that has another name each time (a key's id):
    then all calls of that kind are counted, whatever they are made on.
    """

    scenario: str
    syscall: str
    path: str
    nth: int
    #: The file's name with no index in it, and how it was opened.
    role: str

    @property
    def faults(self) -> tuple[str, ...]:
        """What can be done to it."""
        if self.syscall == "close":
            return ("KILL",)
        return ("KILL", "EIO") if self.syscall in _NO_SPACE_NEEDED else ("KILL", "EIO", "ENOSPC")


@dataclass(frozen=True)
class Result:
    """What came of one run: `problem` is empty when all is well."""

    call: Call
    fault: str
    problem: str
    #: The process survived the fault, ended by itself with a message, or was killed.
    end: str


class Bench:
    """One process that lives the lives, with a log and a timestamp authority of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._count = 0
        self._templates: dict[str, Path] = {}

    def __enter__(self) -> Self:
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.signer.crash_driver"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._around: Surroundings | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._zygote.stdin and self._zygote.stdout
        self._zygote.stdin.close()
        self._zygote.wait(_SECONDS)
        self._zygote.stdout.close()
        self._stack.close()

    @property
    def around(self) -> Surroundings:
        """The log and the authority, from the first time that they are needed."""
        if self._around is None:
            self._around = self._stack.enter_context(surroundings(2))
            root, config = self._around.documents()
            (self._folder / "documents").write_text(f"{json.dumps(root)}\n{json.dumps(config)}")
        return self._around

    @contextmanager
    def prepared(self, scenario: str) -> Iterator[Path]:
        """Give a folder in which the scenario may begin."""
        self._count += 1
        folder = self._folder / f"run-{self._count}"
        if scenario == "submit":
            # Another chain each time, or the log would know its entries already.
            SCENARIOS[scenario](folder)
        else:
            if scenario not in self._templates:
                template = self._folder / f"template-{scenario}"
                template.mkdir()
                SCENARIOS[scenario](template)
                self._templates[scenario] = template
            shutil.copytree(self._templates[scenario], folder)
        yield folder
        shutil.rmtree(folder)

    def _ask(self, scenario: str, folder: Path, *, traced: bool, warm: bool = False) -> None:
        script = "submit" if scenario == "submit" else "life"
        order = {"script": script, "folder": str(folder), "traced": traced, "warm": warm}
        if scenario == "submit":
            assert self.around
            order["documents"] = str(self._folder / "documents")
        assert self._zygote.stdin
        self._zygote.stdin.write(json.dumps(order) + "\n")
        self._zygote.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._zygote.stdout
        line = self._zygote.stdout.readline()
        assert line, "the driver is gone"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def live(self, scenario: str, folder: Path, *, warm: bool = False) -> dict[str, Any]:
        """Live a life without a fault."""
        self._ask(scenario, folder, traced=False, warm=warm)
        return self._answer()

    def traced(self, scenario: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
        """Live a life under strace; return what came of it, and what strace saw."""
        if scenario == "submit":
            self.around.log.fail_next(1, 400)
        self._ask(scenario, folder, traced=True)
        pid = self._answer()["pid"]
        seen = folder.with_suffix(".strace")
        strace = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "0", "-o", str(seen), *options, "-p", str(pid)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert strace.stderr
        said = strace.stderr.readline()
        if "attached" not in said:
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"strace cannot trace here: {said}")
        # A life that hangs is a finding, and must not hang the matrix.
        watchdog = threading.Timer(_SECONDS, os.kill, (pid, signal.SIGABRT))
        watchdog.start()
        os.kill(pid, signal.SIGCONT)
        answer = self._answer()
        watchdog.cancel()
        strace.stderr.read()
        strace.wait(_SECONDS)
        strace.stderr.close()
        text = seen.read_text()
        seen.unlink()
        return answer, text

    # -- the calls -------------------------------------------------------------------------------------

    def calls(self, scenario: str) -> list[Call]:
        """Return every call that the scenario makes on files of its folder."""
        with self.prepared(scenario) as folder:
            answer = self.live(scenario, folder, warm=True)
            assert answer["code"] == 0, answer
        with self.prepared(scenario) as folder:
            answer, text = self.traced(scenario, folder, "-e", "trace=%file,%desc")
            assert answer["code"] == 0, answer
            where = str(folder)
        found: dict[Call, None] = {}
        counts: Counter[tuple[str, str, str]] = Counter()
        for line in text.splitlines():
            match = _CALL.match(line)
            if match is None:
                continue
            thread, syscall, rest = match.groups()
            mine = [path for path in _PATH.findall(rest) if path == where or path.startswith(where + "/")]
            counts.update((thread, syscall, path) for path in {"", *mine[:1]})
            if mine:
                # Of a rename strace looks at the old name only.
                path = "" if re.search("[0-9a-f]{64}", mine[0]) else mine[0]
                role = re.sub(r"[0-9a-f]{64}|\d{6}", "N", mine[-1].removeprefix(where)) or "/"
                if "O_CREAT" in rest:
                    role += " new"
                nth = counts[thread, syscall, path]
                found[Call(scenario, syscall, path.removeprefix(where), nth, role)] = None
        return list(found)

    def run(self, call: Call, fault: str) -> Result:
        """Do one run of the matrix."""
        with self.prepared(call.scenario) as folder:
            how = "signal=KILL" if fault == "KILL" else f"error={fault}"
            inject = f"inject={call.syscall}:{how}:when={call.nth}"
            before = self._logged()
            only = ("-P", f"{folder}{call.path}") if call.path else ()
            answer, text = self.traced(call.scenario, folder, "-e", f"trace={call.syscall}", "-e", inject, *only)
            told = answer["told"]
            end = "killed" if answer["code"] == -signal.SIGKILL else "ended" if answer["code"] else "went on"
            try:
                _hit(text, str(folder), fault)
                _ended_well(answer, fault)
                if (folder / "evidence" / names.CHAIN).exists() and call.scenario != "submit":
                    # What is not signed yet is no fault, and a first life may not have got as far as keys.
                    codes = {f.code for f in verify_chain(folder / "evidence").faults}
                    assert codes <= {"unsigned"}, f"between the lives: {codes}"
                after = self.live(call.scenario, folder)
                assert after["code"] == 0, f"the next life: {after}"
                self.check(call.scenario, folder, [*told, *after["told"]], before)
                problem = ""
            except AssertionError as e:
                problem = str(e) or "?"
            return Result(call, fault, problem, end)

    def _logged(self) -> int:
        return self._around.log.v2.tree.size if self._around else 0

    def check(self, scenario: str, folder: Path, told: list[dict[str, Any]], logged_before: int) -> None:
        """Make sure of everything that a whole life promises, whatever lives there were."""
        if scenario == "submit":
            self._check_log(folder, logged_before)
            return
        report = verify_chain(folder / "evidence")
        assert not report.faults, report.faults
        strange = [w for w in report.warnings if w.code != "left_over"]
        assert not strange, strange
        sums = report.totals
        assert (sums.produced, sums.recorded, sums.filtered, sums.lost) == (17, 10, 6, 1), sums
        wanted = sorted(line for _, body in batches() for line in body.splitlines())
        files = sorted((folder / "evidence").glob(f"*.{names.DATA}"))
        lines = sorted(line for path in files for frame in frames_of(path) for line in frame.splitlines())
        assert wanted == lines, "lines differ"
        statements = {chunk.statement_sha256 for chunk in report.chunks}
        assert {item["statement"] for item in told if "statement" in item} <= statements, "a signed statement is gone"
        acknowledged: set[int] = set()
        for item in told:
            if item["what"] == "ack":
                acknowledged.add(item["number"])
            elif item["what"] == "kept":
                assert acknowledged <= set(item["numbers"]), "an acknowledged batch is gone"

    def _check_log(self, folder: Path, before: int) -> None:
        node = Node(folder, NAME)
        trust = Trust(dict.fromkeys(load_trusted(node.where.state), ""), root=self.around.services().root)
        report = verify_chain(node.evidence, trust=trust, head=node.where.head)
        assert not report.faults, report.faults
        assert [VALID_LOGGED] * 2 == [chunk.status for chunk in report.chunks], report.chunks
        assert all(chunk.logged_by == chunk.index and chunk.trusted_time for chunk in report.chunks), report.chunks
        assert self._logged() == before + 2, "an entry was made twice"
        rejected = node.where.state / "rejected.json"
        assert not rejected.exists() or b'"chunks":{}' in rejected.read_bytes(), rejected.read_bytes()
        assert (node.where.state / "checkpoints.json").exists()


def _hit(text: str, folder: str, fault: str) -> None:
    """Make sure that the fault came where it was meant to: on a file of the folder."""
    if fault == "KILL":
        assert "+++ killed by SIGKILL" in text, "it was not killed"
        return
    lines = [line for line in text.splitlines() if "(INJECTED)" in line]
    assert lines and any(folder in line for line in lines), f"no call of the folder was failed: {lines}"


def _ended_well(answer: dict[str, Any], fault: str) -> None:
    """After an error the process goes on, or ends with a message for people; a kill is a kill."""
    if fault == "KILL":
        assert answer["code"] == -signal.SIGKILL, answer
        return
    last = answer["told"][-1] if answer["told"] else {}
    assert answer["code"] == 0 or (last.get("what") == "refused" and last["error"] and last["hint"]), answer


# -- the matrix --------------------------------------------------------------------------------------------------------


def whole(calls: Iterable[Call]) -> list[tuple[Call, str]]:
    """Return every call with everything that can be done to it."""
    return [(call, fault) for call in calls for fault in call.faults]


def representative(calls: Iterable[Call]) -> list[tuple[Call, str]]:
    """Return the first call of each kind on each kind of file, killed and failed, the errors in turn.

    Of a recovery that is what comes before the script goes on, and the one or the other.
    """
    first: dict[tuple[str, str, str], Call] = {}
    going_on: set[str] = set()
    for call in calls:
        if call.scenario in ("closing", "unsigned", "head-behind") and call.role.endswith("open.journal new"):
            going_on.add(call.scenario)
        changes = call.syscall in CHANGES and (call.syscall != "openat" or call.role.endswith(" new"))
        if changes and call.scenario not in going_on:
            first.setdefault((call.scenario, call.syscall, call.role), call)
    chosen = []
    for n, call in enumerate(first.values()):
        errors = call.faults[1:]
        both = [(call, "KILL"), (call, errors[n // 2 % len(errors)])]
        chosen += both if call.scenario in ("life", "submit") else both[n % 2 :][:1]
    return chosen


def results(choose: Callable[[Iterable[Call]], list[tuple[Call, str]]], workers: int) -> list[Result]:
    """Run what `choose` takes of all calls of all scenarios."""
    with ExitStack() as stack:
        # In memory where there is such a place: a kill loses nothing that was written, synced or not.
        shm = Path("/dev/shm")
        where = tempfile.TemporaryDirectory(prefix="crash-matrix-", dir=shm if shm.is_dir() else None)
        folder = Path(stack.enter_context(where))
        benches = []
        for n in range(workers):
            mine = folder / str(n)
            mine.mkdir()
            benches.append(stack.enter_context(Bench(mine)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        # Each bench finds the calls itself, for that warms its process up; all find the same.
        plans = list(pool.map(lambda bench: [c for s in SCENARIOS for c in bench.calls(s)], benches))
        assert all(plan == plans[0] for plan in plans), "two first lives made different calls"
        runs = choose(plans[0])
        shares = [runs[n::workers] for n in range(workers)]
        done = pool.map(lambda pair: [pair[0].run(*run) for run in pair[1]], zip(benches, shares, strict=True))
        return [result for share in done for result in share]


def tracing_refused() -> str:
    """Return why nothing can be traced here, "" when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as child:
        try:
            asked = ["strace", "-o", "/dev/null", "-p", str(child.pid)]
            tracer = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True)
            assert tracer.stderr
            said = tracer.stderr.readline()
            child.kill()
            tracer.stderr.read()
            tracer.wait(_SECONDS)
            tracer.stderr.close()
        finally:
            child.kill()
    return "" if "attached" in said else f"strace may not trace here: {said.strip()}"


def main() -> int:
    """Run the matrix and print what came of it."""
    parser = argparse.ArgumentParser(description="Fails and kills the signer at every system call on its files.")
    parser.add_argument("--slice", action="store_true", help="only the representative runs")
    options = parser.parse_args()
    if why := tracing_refused():
        sys.stderr.write(f"{why}\n")
        return 3
    began = time.monotonic()
    found = results(representative if options.slice else whole, os.cpu_count() or 1)
    print(f"{'scenario':<12} {'runs':>5} {'went on':>8} {'ended':>6} {'killed':>7} {'failed':>7}")
    for scenario in SCENARIOS:
        mine = [result for result in found if result.call.scenario == scenario]
        ends = Counter(result.end for result in mine)
        failed = sum(1 for result in mine if result.problem)
        print(f"{scenario:<12} {len(mine):>5} {ends['went on']:>8} {ends['ended']:>6} {ends['killed']:>7} {failed:>7}")
    failed = [result for result in found if result.problem]
    for result in failed:
        call = result.call
        print(f"FAILED {call.scenario} {call.syscall} #{call.nth} {call.role} {result.fault}: {result.problem}")
    print(f"{len(found)} runs, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
