"""A node against a program that makes exactly N of everything: the evidence holds exactly N of each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jsonschema
import pytest

from stella_shared.events import json_schema
from stella_shared.evidence.compressed import frames_of
from tests.system.node import HERE, Node, running

pytestmark = pytest.mark.kernel

N = 40


def certificate(folder: Path) -> Path:
    """Make a throw-away self-signed certificate with its key in one file."""
    out = folder / "tls.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-subj", "/CN=localhost", "-days", "2", "-keyout", out, "-out", folder / "crt.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    out.write_bytes(out.read_bytes() + (folder / "crt.pem").read_bytes())
    return out


def make_events(node: Node, folder: Path) -> int:
    """Run known_count.py in the node's cgroup; return its pid."""
    process = node.cgroup.run(
        sys.executable, HERE / "known_count.py", folder, str(N), certificate(folder),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert b"ready\n" == process.stdout.readline()
    # TLS probes of a target process are attached when its library has been seen; coverage says since when.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        collector = next(s for s in node.get("/status")["services"] if s["service"] == "collector")
        if all(p["attached"] for p in collector["detail"]["probes"]):
            break
        time.sleep(0.2)
    time.sleep(0.5)
    process.stdin.write(b"go\n")
    process.stdin.flush()
    assert b"done\n" == process.stdout.readline()
    process.communicate(b"end\n", timeout=10)
    return process.pid


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory):
    """A node that has seen the program, and was stopped in order."""
    folder = tmp_path_factory.mktemp("known")
    with running(folder / "node", "known") as running_node:
        (folder / "work").mkdir()
        command = [sys.executable, "-m", "stella_cli", "signals", "tail", "--config", running_node.config]
        with (
            (folder / "tail.ndjson").open("wb") as out,
            subprocess.Popen([*command, "--format", "json"], stdout=out) as tail,
        ):
            try:
                time.sleep(1.0)
                running_node.pid = make_events(running_node, folder / "work")
                running_node.privileges = {
                    row["service"]: row["detail"]["privileges"] for row in running_node.get("/status")["services"]
                }
                time.sleep(1.5)
            finally:
                tail.terminate()
        running_node.tailed = (folder / "tail.ndjson").read_bytes()
        running_node.work = folder / "work"
        running_node.stop()
        yield running_node


def test_exactly_n_of_everything_is_in_the_evidence(node: Node) -> None:
    """Opens, execs, connects, accepts, TLS reads and writes: as many as were made, no more, no fewer."""
    seen: Counter[str] = Counter()
    tls_bytes: Counter[str] = Counter()
    for line in node.lines():
        event = line["event"]
        match event["type"]:
            case "file_open" if str(event.get("path", "")).startswith(f"{node.work}/known-") and event["result"] >= 0:
                # The first eight are the program's own preparation, by touch.
                seen["open" if event["access"] == "read" else "touch"] += 1
            case "process_exec" if event["filename"] == "/bin/true":
                assert ["true", "one", "t w o"] == event["argv"]
                seen["exec"] += 1
            case "net_connect" if line["pid"] == node.pid:
                assert event["result"] >= 0, event
                seen[f"{event['direction']} {event['family']}"] += 1
            case "ssl_op" if line["pid"] == node.pid and event["bytes"]:
                seen[f"tls {event['direction']}"] += 1
                tls_bytes[event["direction"]] += event["bytes"]
    expected = {"open": N, "exec": N, "tls read": N, "tls write": N}
    for direction in ("connect", "accept"):
        expected |= {f"{direction} ipv4": N, f"{direction} ipv6": N, f"{direction} unix": N}
    touched = seen.pop("touch")
    assert 8 == touched
    assert expected == dict(seen)
    assert {"read": N * (N + 1) // 2, "write": N * (N + 1) // 2} == dict(tls_bytes)


def test_nothing_was_lost_and_the_chain_is_valid(node: Node) -> None:
    """The identity holds without a loss, as seen by a verifier that trusts the node's key."""
    report = node.verify()
    assert report.valid, report
    assert {} == {cause: n for ledger in node.ledgers() for cause, n in ledger["lost"].items()}


def test_all_of_it_was_done_behind_the_filters(node: Node) -> None:
    """Every part ran with its system calls filtered and without a refusal; the collector with what it names."""
    assert {"collector", "enricher", "gateway", "signer"} == set(node.privileges)
    for service, left in node.privileges.items():
        expected = "only those of its list" if service == "collector" else "all but those of a list"
        assert (expected, {}, True) == (left["system_calls"], left["refused_calls"], left["no_new_privileges"]), service
    assert ["DAC_READ_SEARCH", "SYS_PTRACE", "SYS_ADMIN", "PERFMON", "BPF"] == node.privileges["collector"][
        "capabilities"
    ]


def test_every_line_validates_against_the_schema(node: Node) -> None:
    """The generated JSON Schema accepts every line that was signed."""
    validator = jsonschema.Draft202012Validator(json_schema())
    for line in node.lines():
        validator.validate(line)


def test_a_subscriber_sees_the_bytes_that_are_signed(node: Node) -> None:
    """`stella signals tail` gives, byte for byte, lines of the evidence."""
    signed = {
        line for path in node.evidence.glob("*.ndjson.zst") for frame in frames_of(path) for line in frame.splitlines()
    }
    tailed = node.tailed.splitlines()
    assert len(tailed) > 5 * N
    assert set(tailed) <= signed


def test_tcp_states_name_a_process_only_where_it_is_known(node: Node) -> None:
    """Transitions that came from the network carry the socket's owner or nobody, never a bystander."""
    states = [line for line in node.lines() if line["event"]["type"] == "tcp_state"]
    assert states
    for line in states:
        if line["event"]["attribution"] == "none":
            assert "pid" not in line and "comm" not in line
        else:
            assert node.pid == line["pid"]


def test_one_changed_byte_is_found(node: Node, tmp_path: Path) -> None:
    """`verify-chain` says INVALID, names the chunk and ends with 1, after any byte of a chunk was changed."""
    import shutil

    copy = tmp_path / "evidence"
    shutil.copytree(node.evidence, copy)
    shutil.copytree(node.state / "keys", tmp_path / "state" / "keys")
    chunk = max(copy.glob("*.ndjson.zst"), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    done = node.stella("verify-chain", str(copy), check=False)
    assert 1 == done.returncode
    assert "Chain Status: ✗ INVALID" in done.stdout
    assert f"Chain broken at chunk {int(chunk.name[:6])}" in done.stdout
    machine = node.stella("verify-chain", str(copy), "--format", "json", check=False)
    assert not json.loads(machine.stdout)["valid"]
