"""The runbook, walked from top to bottom: each command line in it is run as it stands there, on a node of its own.

The walk has a mount and a network namespace of its own, so that the default paths and ports are free, and a node
that watches one cgroup.  Names that the page makes up (a key, a chunk) are put right by `Walk.real`; what is not run
stands in `NOT_RUN` with its reason.  It needs root and a kernel with BTF; nothing of it is skipped where it runs.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from stella_shared.evidence.compressed import frames_of, pack
from tests.system.node import Cgroup

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
MADE_UP_KEY = "sha256:69e46b53951321efac93c8e7d22eae5458175d8205f9d9bec4f4df681228655e"
PLACES = ("/var/lib/stellaops", "/imported", "/mnt/evidence-archive", "/etc/stellaops")

#: The page's own way to end a node at once.
KILL = next(line for line in PAGE.splitlines() if line.startswith("kill -9 "))
#: Beginnings of lines that are not run, and why.
NOT_RUN = {
    "journalctl": "the node under test is no systemd unit",
    "coredumpctl": "the same",
    "systemctl": "the same; tests/deploy/test_systemd.py has units",
    "docker compose": "needs an engine; tests/deploy/test_compose.py has one",
    "curl https://rekor.example": "a name that stands for your log",
    "git pull": "the tree is what is tested",
    "make install": "the same",
    "scp": "there is no other machine",
    "dmesg": "other people's kernel messages",
    "docker ps": "needs an engine; tests/enricher/test_docker_engine.py has one",
    "crictl ps": "the same",
    "stella signals resubmit-pending": "no log is configured; tests/system/test_log.py has one",
    "stella signals verify-chain evidence.tar.gz --identity": "keyless; tests/signer/test_remote_keys.py has it",
    "stella signals verify-chain --offline evidence.tar.gz": "needs a log's trusted root; tests/system/test_log.py",
    "stella signals lines 42 | stella signals symbolize": "needs frames; tests/cli/test_symbolize.py has them",
    "stella signals symbolize 93ac61ec5a8eb1396f9fbd350e3169a558528a40": "the same",
    "stella signals inspect registry.example/shop": "no container runs; tests/cli/test_inspect.py",
    "stella signals detach --all": "it would end every node here; tests/system/test_detach.py has it in a namespace",
    'stella signals lines 42 | grep \'"type":"net_connect"\'': "as the line before it; tests/evidence/test_proof.py",
}
#: Ends other than with 0, by the beginning of the line: which codes are right, and words that tell why.
ENDS_WITH: dict[str, tuple[set[int], str]] = {
    "stella signals verify-chain /var/lib/stellaops/evidence/#damaged": ({1}, "Chain Status: ✗ INVALID"),
    "stella signals reset-chain --confirm#running": ({10}, "a node is already running on"),
    'grep \'"level": "error"\'': ({1}, ""),
    "stella signals lines 42 | grep '\"argv_redacted\"'": ({1}, ""),
    "tail -f": ({124}, ""),
    "file /path/to/binary": ({0, 1}, ""),
    # Another node may run on this machine; ours is gone by then, which tests/system/test_detach.py looks at.
    "bpftool prog list": ({0, 1}, ""),
    "stella signals stats | grep containers_unknown": ({0, 1}, ""),
}


class Step(NamedTuple):
    """A command line of the page, its line there, and what a console block shows below it."""

    line: int
    command: str
    shown: list[str]


def steps() -> Iterator[Step]:
    """Yield the command lines of shell and console blocks, in order."""
    for block in re.finditer(r"^[ ]*```(sh|console)\n(.*?)^[ ]*```", PAGE, re.MULTILINE | re.DOTALL):
        at = PAGE.count("\n", 0, block.start()) + 1
        lines = re.sub(r"\\\n\s*", "", block[2]).splitlines()
        if block[1] == "sh":
            yield from (Step(at, line.strip(), []) for line in lines if line.strip() and line.strip()[0] != "#")
            continue
        step: Step | None = None
        for line in lines:
            if line.startswith("$ "):
                if step:
                    yield step
                step = Step(at, line[2:], [])
            elif step and line.strip() not in ("", "…"):
                step.shown.append(line)
        if step:
            yield step


class Walk:
    """Namespaces of our own, and the shell in which the page's lines are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cgroup = Cgroup("runbook")
        self.made = [place for place in map(Path, PLACES) if not place.exists()]
        for place in self.made:
            place.mkdir(parents=True)
        config = {
            "node": "docs-example",
            "filters": {"target_cgroups": [self.cgroup.name], "paths": {"denylist": []}},
            "logging": {"format": "json"},
            "rotation": {"max_age_hours": 0.0008},
        }
        (folder / "stellaops.yaml").write_text(yaml.safe_dump({"signals": config}))
        self.holder = subprocess.Popen(["unshare", "--mount", "--net", "sleep", "infinity"])
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("STELLA_")}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        self.env["HOME"] = str(folder)
        mounts = "; ".join(f"mkdir -p {folder}{place} && mount --bind {folder}{place} {place}" for place in PLACES)
        deadline = time.monotonic() + 10
        while os.readlink(f"/proc/{self.holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done = self.run(f"ip link set lo up && {mounts} && cp {folder}/stellaops.yaml /etc/stellaops/stellaops.yaml")
        assert 0 == done.returncode, done.stderr

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line as bash does, inside."""
        words = ["nsenter", "-t", str(self.holder.pid), "-m", "-n", f"--wd={self.folder}", "bash", "-c", command]
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=90, check=False)

    def work(self) -> None:
        """Let something be seen: opens under /etc, which is what the defaults watch."""
        for _ in range(3):
            self.cgroup.run("/bin/sh", "-c", "cat /etc/hostname /etc/passwd >/dev/null").wait()

    def closed(self) -> list[Path]:
        """Return the closed chunks that hold more than one line."""
        evidence = self.folder / "var/lib/stellaops/evidence"
        files = sorted(p for p in evidence.glob("*.ndjson.zst") if "open" not in p.name)
        return [p for p in files if lines_of(p).count(b"\n") > 1]

    def close(self) -> None:
        self.run("stella signals stop")
        self.run("stella signals detach --wait 0 --pins")
        self.holder.send_signal(signal.SIGKILL)
        self.holder.wait()
        self.cgroup.remove()
        for place in self.made:
            place.rmdir()

    # -- what the page makes up --------------------------------------------------------------------------

    def real(self, command: str) -> str:
        """Return a line with what exists here in the place of the page's examples."""
        if closed := self.closed():
            line = json.loads(lines_of(closed[-1]).partition(b"\n")[0])
            place, chunk = f"{line['run']}/{line['lane']}/{line['seq']}", str(int(closed[-1].name[:6]))
            command = command.replace("57e2e7ab61a13058/4/1", place).replace("42:17 42:18", f"{chunk}:1 {chunk}:2")
            command = command.replace("lines 42", f"lines {chunk}").replace("/etc/ld.so.cache", "/etc/passwd")
        if MADE_UP_KEY in command:
            shown = self.run("stella signals init").stdout
            found = re.search(r"signing key\s+(sha256:[0-9a-f]{64})", shown)
            assert found, shown
            command = command.replace(MADE_UP_KEY, found[1])
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        command = command.replace("--from 2026-01-01", f"--from {today}").replace("--to 2026-01-31", f"--to {today}")
        command = command.replace("/path/to/binary", "/bin/true").replace("/proc/PID/", "/proc/self/")
        command = command.removeprefix("sudo ")
        command = re.sub(r"^tail -f", "timeout 1 tail -f", command)
        command = re.sub(r"^watch -n 5 '(.*)'", r"\1", command)
        return command.replace("--wait 3600", "--wait 1")


def lines_of(chunk: Path) -> bytes:
    return b"".join(frames_of(chunk))


def label(shown: str) -> str:
    """Return what a shown line must have in common with a real one: its words before the first figure."""
    return re.split(r"\s{2,}|\d|\(|[a-f0-9]{16}", shown.strip())[0].strip()


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    made = Walk(tmp_path)
    try:
        yield made
    finally:
        made.close()


def damage(walk: Walk, *, undo: bool) -> None:
    """Edit a closed chunk, or put it back."""
    chunk = walk.closed()[0]
    kept = walk.folder / "kept"
    if undo:
        shutil.copy(kept, chunk)
    else:
        shutil.copy(chunk, kept)
        chunk.write_bytes(pack(lines_of(chunk).replace(b'"/etc/', b'"/etd/')))


def prepare(walk: Walk, step: Step, running: bool) -> str:
    """Bring about what the page takes for granted at a line; return the key of its expected end."""
    command = step.command
    if step.shown and "INVALID" in step.shown[0]:
        damage(walk, undo=False)
        return f"{command}#damaged"
    if command == "stella signals reset-chain --confirm" and running:
        return f"{command}#running"
    if command.startswith("stella signals stop") and not running:
        assert 0 == walk.run("stella signals start --detach").returncode
    if command.startswith("stella signals start") and running:
        # The page's case: the whole node is down, and nobody has stopped it.
        assert 0 == walk.run(KILL).returncode
    if command.startswith("stella signals prove") or "evidence.tar.gz --key" in command:
        walk.run("test -e evidence.tar.gz || tar -czf evidence.tar.gz -C /var/lib/stellaops evidence")
    if command.startswith("kill -9") and not running:
        assert 0 == walk.run("stella signals start --detach").returncode
    return command


def is_running(walk: Walk) -> bool:
    return walk.run("stella signals health").returncode != 4


def test_every_command_of_the_runbook_does_what_the_page_says(walk: Walk) -> None:
    """Exit codes as the page's table has them, and the lines that a console block shows."""
    assert 0 == walk.run("stella signals init && stella signals start --detach").returncode
    deadline = time.monotonic() + 30
    while not walk.closed():
        assert time.monotonic() < deadline, "no chunk with lines was closed"
        walk.work()
        time.sleep(0.5)
    wrong: list[str] = []
    ran = 0
    running = True
    for step in steps():
        if any(step.command.startswith(begin) for begin in NOT_RUN):
            continue
        key = prepare(walk, step, running)
        codes, words = next((end for begin, end in ENDS_WITH.items() if key.startswith(begin)), ({0}, ""))
        done = walk.run(walk.real(step.command))
        ran += 1
        said = done.stdout + done.stderr
        where = f"docs/runbook.md:{step.line}: {step.command}"
        if done.returncode not in codes:
            wrong.append(f"{where}\n  ended with {done.returncode}, not {codes}\n{said[-800:]}")
        if words not in said:
            wrong.append(f"{where}\n  does not say {words!r}:\n{said[-800:]}")
        if key.endswith("#damaged"):
            damage(walk, undo=True)
        for shown in step.shown:
            if label(shown) and label(shown) not in said:
                wrong.append(f"{where}\n  shows no {label(shown)!r}:\n{said[-800:]}")
        if re.match(r"stella signals (stop|start|init|reset-chain)|kill -9", step.command):
            running = is_running(walk)
    assert not wrong, "\n\n".join(wrong)
    assert ran > 45


def test_what_is_not_run_is_there() -> None:
    """No reason outlives its line."""
    lines = [step.command for step in steps()]
    unused = [begin for begin in NOT_RUN if not any(line.startswith(begin) for line in lines)]
    assert [] == unused
