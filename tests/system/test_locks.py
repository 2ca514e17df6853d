"""What a real node can no longer do, and what it tells nobody."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.system.node import HERE, Node, running

pytestmark = pytest.mark.kernel

NO_FILE_PROBES = {"openssl_read": False, "openssl_write": False}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory):
    """A running node without probes in libraries, which a token opens to other machines, and which saw some opens."""
    folder = tmp_path_factory.mktemp("locks")
    token = folder / "token"
    token.write_text("token-of-this-test-0123456789\n")
    token.chmod(0o600)
    metrics = {"token_file": str(token)}
    with running(folder / "node", "locks", probes=NO_FILE_PROBES, metrics=metrics) as running_node:
        running_node.cgroup.run("/bin/cat", "/etc/hostname", stdout=subprocess.DEVNULL).wait()
        time.sleep(2.5)
        running_node.token = token
        yield running_node


def tasks(pid: int) -> list[dict[str, str]]:
    """Return the status of each thread of a process."""
    found = []
    for path in Path(f"/proc/{pid}/task").iterdir():
        text = (path / "status").read_text()
        found.append({key: value.strip() for key, _, value in (row.partition(":") for row in text.splitlines())})
    return found


def test_a_collector_that_attaches_nothing_more_keeps_no_power_to(node: Node) -> None:
    """CAP_PERFMON and CAP_SYS_ADMIN are gone from every thread and every set, and records go on coming."""
    kept = "0000008000080004"  # BPF, SYS_PTRACE, DAC_READ_SEARCH
    for task in tasks(node.pids()["collector"]):
        assert (kept, kept, "0000000000000000", "1", "2") == (
            task["CapPrm"], task["CapEff"], task["CapAmb"], task["NoNewPrivs"], task["Seccomp"],
        )  # fmt: skip
        assert kept == task["CapBnd"]
    collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
    assert {} == collector["detail"]["privileges"]["refused_calls"]
    before = collector["detail"]["records"]
    assert before > 0
    node.cgroup.run("/bin/cat", "/etc/hostname", stdout=subprocess.DEVNULL).wait()
    time.sleep(2.5)
    collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
    assert collector["detail"]["records"] > before
    assert "Operation not permitted" not in node.logs()


def test_every_part_is_behind_a_filter_and_can_gain_nothing(node: Node) -> None:
    """No thread of any part is without filter or without no_new_privs; the bus server has no privileges to gain."""
    pids = node.pids()
    del pids["supervisor"]
    assert {"nats", "collector", "enricher-1", "signer", "gateway"} == set(pids)
    for name, pid in pids.items():
        for task in tasks(pid):
            assert "1" == task["NoNewPrivs"], name
            assert ("0" if name == "nats" else "2") == task["Seccomp"], name


def secrets_of(node: Node) -> dict[str, bytes]:
    """Return everything that nobody may be told, by what it is."""
    found = {"token": node.token.read_bytes().strip()}
    for user, entry in json.loads((node.state / "bus.json").read_text())["users"].items():
        for key in ("password", "seed"):
            if entry.get(key):
                found[f"{user}'s {key}"] = entry[key].encode()
    pem = (node.state / "keys" / "signing.key").read_text()
    found["signing key"] = re.sub(r"-----[^-]+-----|\s", "", pem)[:48].encode()
    return found


def test_no_secret_is_told(node: Node) -> None:
    """Not in logs, not over HTTP, not in command lines or environments, not by a command, not in the evidence."""
    secrets = secrets_of(node)
    assert {"collector's seed", "operator's seed"} <= set(secrets)
    assert len(secrets) >= 6
    places: dict[str, bytes] = {}
    for path in (node.state / "logs").glob("*"):
        places[str(path)] = path.read_bytes()
    for path in ("/", "/health", "/status", "/metrics", "/health/ready"):
        places[path] = subprocess.run(
            ["curl", "-s", "-i", f"http://127.0.0.1:{node.http}{path}"], capture_output=True, check=True
        ).stdout
        assert places[path], path
    for name, pid in node.pids().items():
        for kind in ("cmdline", "environ", "comm"):
            places[f"{name}'s {kind}"] = Path(f"/proc/{pid}/{kind}").read_bytes()
    for words in (("status", "--verbose", "--format", "json"), ("health",), ("stats", "--memory")):
        done = node.stella(*words, check=False)
        places[" ".join(words)] = (done.stdout + done.stderr).encode()
        assert done.stdout, words
    bundle = node.folder / "support.tar.gz"
    node.stella("support-bundle", "--output", str(bundle))
    with tarfile.open(bundle) as packed:
        for member in packed.getmembers():
            if member.isfile():
                places[f"support bundle: {member.name}"] = packed.extractfile(member).read()
    assert [where for where in places if where.startswith("support bundle")]
    for path in node.evidence.rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes()
    for path in (node.state / "run").rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes()
    told = [(what, where) for where, content in places.items() for what, secret in secrets.items() if secret in content]
    assert [] == told


def test_secrets_lie_in_private_files_only(node: Node) -> None:
    """Every file of the state directory that holds one is of mode 0600, in a directory of mode 0700."""
    holders = []
    for path in node.state.rglob("*"):
        if path.is_file() and path.stat().st_size < 1 << 20:
            content = path.read_bytes()
            if any(secret in content for what, secret in secrets_of(node).items() if what != "token"):
                assert 0o600 == path.stat().st_mode & 0o777, path
                holders.append(path.relative_to(node.state).as_posix())
    assert {"keys/signing.key", "bus.json"} == set(holders)
    assert 0o700 == os.stat(node.state).st_mode & 0o777


def test_ways_around_the_probes_are_as_documented(node: Node, tmp_path: Path) -> None:
    """Opens and connects through io_uring, and opens by 32-bit calls, make no line.  That io_uring was used is told."""
    program = tmp_path / "uncommon_ways"
    subprocess.run(["cc", "-O2", "-o", program, HERE / "uncommon_ways.c"], check=True)
    by_ring, by_32_bit = tmp_path / "by-ring", tmp_path / "by-32-bit"
    by_ring.touch()
    by_32_bit.touch()
    with socket.create_server(("127.0.0.1", 0), backlog=32) as listener:
        port = listener.getsockname()[1]
        run = node.cgroup.run(program, "uring", by_ring, "7", str(port), stdout=subprocess.PIPE)
        assert b"7 7\n" == run.communicate(timeout=20)[0]
    if platform.machine() == "x86_64":
        run = node.cgroup.run(program, "int80", by_32_bit, "7", stdout=subprocess.PIPE)
        assert b"7\n" == run.communicate(timeout=20)[0]
    time.sleep(2.5)
    collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
    assert {"ring": 1, "open": 7, "connect": 7, "accept": 0} == collector["detail"]["io_uring"]
    node.stop()
    lines = list(node.lines())
    paths = {str(line["event"].get("path", "")) for line in lines}
    assert not {str(by_ring), str(by_32_bit)} & paths
    assert not [line for line in lines if line["event"]["type"] == "net_connect" and str(port) in str(line["event"])]
    # The states of the connections are seen all the same.
    assert [line for line in lines if line["event"]["type"] == "tcp_state" and str(port) in str(line["event"])]
    documents = b"".join(path.read_bytes() for path in node.evidence.glob("*.ledger.json"))
    assert b'"io_uring":["connect","open","ring"]' in documents.replace(b"\\", b"")
