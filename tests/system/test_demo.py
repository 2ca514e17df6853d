"""The demonstration: the same pipeline over recorded ring bytes, without any privilege."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

from stella_shared.evidence.compressed import frames_of
from stella_shared.evidence.verify import verify_chain
from tests.system.node import free_port, free_ports

TYPES = {"file_open", "process_exec", "tcp_state", "net_connect", "ssl_op"}


def seen(port: int) -> set[str]:
    """Return the types of events that a node has made lines of, none while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
            return set(json.load(answer)["totals"]["events_by_type"] or {})
    except OSError:
        return set()


def test_the_demo_needs_no_privilege_and_says_what_it_is(tmp_path: Path) -> None:
    """Without any capability the recording becomes a valid chain, whose coverage names the stand-in."""
    config = tmp_path / "stellaops.yaml"
    bus, http = free_ports()
    config.write_text(yaml.safe_dump({"signals": {"bus": {"port": bus}, "metrics": {"port": http}}}))
    evidence = tmp_path / "demo" / "evidence"
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    command = [*powerless, sys.executable, "-m", "stella_cli", "signals", "start", "--demo"]
    command += ["--config", str(config), "--target", str(evidence)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        try:
            deadline = time.monotonic() + 40
            while not seen(http) >= TYPES and time.monotonic() < deadline:
                time.sleep(0.2)
            demo.send_signal(signal.SIGINT)
            said, _ = demo.communicate(timeout=40)
        finally:
            demo.kill()
    assert 0 == demo.returncode, said
    assert "DEMO" in said
    trusted = json.loads((evidence.parent / "state" / "keys" / "trusted.json").read_text())
    report = verify_chain(evidence, trusted_keys={row["key_id"] for row in trusted["keys"]}, head=None, progress=None)
    assert report.valid, said
    ledgers = [json.loads(p.read_text()) for p in sorted(evidence.glob("*.ledger.json"))]
    documents = [entry["document"] for ledger in ledgers for entry in ledger["coverage"]]
    assert documents and all(document["stand_in"].startswith("recording ") for document in documents)
    frames = [frame for path in evidence.glob("*.ndjson.zst") for frame in frames_of(path)]
    lines = [json.loads(line) for frame in frames for line in frame.splitlines()]
    assert {x["event"]["type"] for x in lines} >= TYPES


def test_without_root_the_node_says_what_is_missing(tmp_path: Path) -> None:
    """`start` without capabilities ends with 3, names the capability, and offers the demonstration."""
    config = tmp_path / "stellaops.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "signals": {
                    "output_directory": str(tmp_path / "evidence"),
                    "bus": {"port": free_port()},
                    "metrics": {"port": free_port()},
                }
            }
        )
    )
    stella = [sys.executable, "-m", "stella_cli", "signals"]
    subprocess.run([*stella, "init", "--config", config], check=True, capture_output=True)
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    done = subprocess.run(
        [*powerless, *stella, "start", "--config", config], capture_output=True, text=True, timeout=60, check=False
    )
    assert 3 == done.returncode, done.stdout + done.stderr
    assert "CAP_BPF" in done.stderr
    assert "make demo" in done.stderr
