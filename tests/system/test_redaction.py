"""Secrets on the command lines of real processes: the kernel hands them over, and nothing that we write has them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.node import Node, running

pytestmark = pytest.mark.kernel

#: Stands for a secret, wherever one is.
SECRET = "Zq8hunter2Xy"
#: The same, where the configuration says that it may be recorded: what shows that the rest was there to be seen.
OPEN = "Zq8openly2Xy"
BADGE = "734019"


def commands(folder: Path) -> dict[str, list[str]]:
    """Return what is run, by the name of the program; each is /bin/true under a name of its own."""
    lines = {
        "app": ["app", "--verbose", f"--password={SECRET}", "--token", SECRET, "--password-file=/run/x"],
        "mysql": ["mysql", "-uroot", f"-p{SECRET}", "db"],
        "curl": ["curl", "-u", f"user:{SECRET}", f"https://user:{SECRET}@example.com/x?token={SECRET}&y=1"],
        "script": ["script", "-c", f"PGPASSWORD={SECRET} psql -h db && mysql -p'{SECRET}' x"],
        "badge": ["badge", f"x badge-{BADGE} y"],
        "kept": ["kept", f"--password={OPEN}"],
        # The kernel's copy of the arguments ends in the middle of the password.
        "cut": ["cut", "x" * (2048 - len(b"cut\0") - len(b"\0https://user:Zq8hunter")), f"https://user:{SECRET}@example.com/"],
    }  # fmt: skip
    for name in lines:
        (folder / name).symlink_to("/bin/true")
    return lines


EXPECTED: dict[str, tuple[list[str], list[int] | None]] = {
    "app": (["app", "--verbose", "--password=***", "--token", "***", "--password-file=/run/x"], [2, 4]),
    "mysql": (["mysql", "-uroot", "-p***", "db"], [2]),
    "curl": (["curl", "-u", "user:***", "https://user:***@example.com/x?token=***&y=1"], [2, 3]),
    "script": (["script", "-c", "PGPASSWORD=*** psql -h db && mysql -p'***' x"], [2]),
    "badge": (["badge", "x badge-*** y"], [1]),
    "kept": (["kept", f"--password={OPEN}"], None),
}


#: How many arguments these have that hold a secret.
REDACTIONS = 8


def counts(node: Node) -> dict[str, int]:
    """Return how many arguments the enricher says that it has redacted, by cause."""
    (enricher,) = (s for s in node.get("/status")["services"] if s["service"] == "enricher")
    return dict(enricher["detail"]["redaction"]["arguments"])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that has seen them, and was stopped in order."""
    folder = tmp_path_factory.mktemp("redaction")
    programs = folder / "bin"
    programs.mkdir()
    redaction = {"patterns": ["badge-(?P<secret>[0-9]+)"], "keep": ["kept"]}
    with running(folder / "node", "redaction", redaction=redaction) as running_node:
        command = [sys.executable, "-m", "stella_cli", "signals", "tail", "--config", running_node.config]
        with (
            (folder / "tail.ndjson").open("wb") as out,
            subprocess.Popen([*command, "--format", "json"], stdout=out) as tail,
        ):
            try:
                time.sleep(1.0)
                for name, argv in commands(programs).items():
                    # execv by a program that is inside already: its own arguments hold no secret but on stdin.
                    runner = running_node.cgroup.run(
                        sys.executable, "-c", "import json, os, sys; os.execv(sys.argv[1], json.load(sys.stdin))",
                        programs / name, stdin=subprocess.PIPE,
                    )  # fmt: skip
                    runner.communicate(json.dumps(argv).encode(), timeout=20)
                    assert 0 == runner.returncode
                deadline = time.monotonic() + 20
                while sum(counts(running_node).values()) < REDACTIONS and time.monotonic() < deadline:
                    time.sleep(0.2)
                time.sleep(1.2)
                running_node.counts = counts(running_node)  # type: ignore[attr-defined]
                running_node.status = running_node.get("/status")  # type: ignore[attr-defined]
                with urllib.request.urlopen(f"http://127.0.0.1:{running_node.http}/metrics", timeout=5) as answer:
                    running_node.metrics = answer.read()  # type: ignore[attr-defined]
            finally:
                tail.terminate()
        running_node.tailed = (folder / "tail.ndjson").read_bytes()  # type: ignore[attr-defined]
        running_node.programs = programs  # type: ignore[attr-defined]
        running_node.stop()
        yield running_node


def execs(node: Node) -> dict[str, dict[str, Any]]:
    """Return the process_exec events of our programs by name."""
    folder = f"{node.programs}/"  # type: ignore[attr-defined]
    found = {}
    for line in node.lines():
        event = line["event"]
        if event["type"] == "process_exec" and event["filename"].startswith(folder):
            found[event["filename"].removeprefix(folder)] = event
    return found


def test_each_command_line_is_recorded_without_its_secret(node: Node) -> None:
    """What is replaced is named by its index, and the length is not told; what is kept is kept whole."""
    found = execs(node)
    assert sorted([*EXPECTED, "cut"]) == sorted(found)
    for name, (argv, indexes) in EXPECTED.items():
        assert (argv, indexes) == (found[name]["argv"], found[name].get("argv_redacted")), name
        assert ("argv_bytes" in found[name]) == (indexes is None)
    cut = found["cut"]
    assert cut["argv_truncated"]
    assert ("https://user:***", [2]) == (cut["argv"][2], cut["argv_redacted"])


def test_no_file_and_no_answer_of_the_node_holds_a_secret(node: Node) -> None:
    """Not the evidence, not what subscribers see, not the logs, /status or /metrics; the chain is valid."""
    evidence = {path: path.read_bytes() for path in node.evidence.rglob("*") if path.is_file()}
    assert any(OPEN.encode() in data for data in evidence.values())
    assert OPEN.encode() in node.tailed  # type: ignore[attr-defined]
    outputs = {str(path): data for path, data in evidence.items()}
    outputs |= {str(path): path.read_bytes() for path in (node.state / "logs").glob("*")}
    outputs["tail"] = node.tailed  # type: ignore[attr-defined]
    outputs["/metrics"] = node.metrics  # type: ignore[attr-defined]
    outputs["/status"] = repr(node.status).encode()  # type: ignore[attr-defined]
    for where, data in outputs.items():
        assert SECRET.encode() not in data, where
        # The longest piece of it that the kernel's cut leaves.
        assert SECRET[:9].encode() not in data, where
        assert f"badge-{BADGE}".encode() not in data, where
    assert node.verify().valid


def test_what_holds_raw_batches_is_its_owners_alone(node: Node) -> None:
    """The bus keeps raw batches, secrets and all, below a directory that nobody else may enter."""
    assert 0o700 == node.state.stat().st_mode & 0o777
    assert (node.state / "nats").is_dir()


def test_redactions_are_counted_and_the_rules_are_named(node: Node) -> None:
    """By cause in /metrics; in /status the version of the rules, with a digest of one's own."""
    (enricher,) = (s for s in node.status["services"] if s["service"] == "enricher")  # type: ignore[attr-defined]
    assert {"rule": REDACTIONS - 1, "pattern": 1, "failure": 0} == node.counts  # type: ignore[attr-defined]
    assert enricher["detail"]["redaction"]["rules"].startswith("1+")
    lines = [x for x in node.metrics.decode().splitlines() if x.startswith("stellaops_signals_redactions_total{")]  # type: ignore[attr-defined]
    assert {"rule": REDACTIONS - 1.0, "pattern": 1.0, "failure": 0.0} == {
        line.split('cause="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines
    }
