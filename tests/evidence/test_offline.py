"""`verify-chain --offline` in a network namespace without any interface: it needs none, logged or not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from tests.evidence.chain_maker import small_chain
from tests.signer.log_kit import Queue, surroundings

pytestmark = pytest.mark.anyio


def verify(evidence: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command where not even loopback is up."""
    command = ["unshare", "--net", sys.executable, "-m", "stella_cli", "signals", "verify-chain", "--offline"]
    return subprocess.run(
        [*command, str(evidence), "--format", "json", *options], capture_output=True, text=True, timeout=60, check=False
    )


async def test_a_logged_chain_is_verified_without_a_network(tmp_path: Path) -> None:
    """Key by fingerprint, trusted root by file; the log and the timestamp authority are long gone."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        await queue.round()
        root, _ = around.documents()
    (tmp_path / "root.json").write_text(json.dumps(root))
    key = f"sha256:{queue.node.key.key_id}"
    done = verify(queue.node.evidence, "--key", key, "--trusted-root", str(tmp_path / "root.json"))
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["valid"], done.stdout + done.stderr
    assert {chunk["status"] for chunk in report["chunks"]} == {"VALID_LOGGED"}
    schema = json.loads((Path(__file__).parents[2] / "docs/reference/chain-report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report)
    # Without a trusted root the log entries are not judged, and the answer says so.
    blind = json.loads(verify(queue.node.evidence, "--key", key).stdout)
    assert blind["valid"] and {chunk["status"] for chunk in blind["chunks"]} == {"VALID_PENDING"}
    assert "unjudged" in {warning["code"] for warning in blind["warnings"]}


async def test_trust_never_comes_from_the_evidence(tmp_path: Path) -> None:
    """A trusted root that lies in the evidence is a file too many, and its log is not believed."""
    with surroundings(2) as mine, surroundings(2) as theirs:
        queue = Queue(tmp_path, theirs)
        await queue.round()
        (queue.node.evidence / "trusted_root.json").write_text(json.dumps(theirs.documents()[0]))
        (tmp_path / "root.json").write_text(json.dumps(mine.documents()[0]))
    done = verify(queue.node.evidence, "--key", queue.node.key.key_id, "--trusted-root", str(tmp_path / "root.json"))
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert {"inserted", "bundle_mismatch"} == {fault["code"] for fault in report["faults"]}


def test_chunks_before_a_logged_one_are_vouched_for_by_it(tmp_path: Path) -> None:
    """With `submit_every` the chunks between are VALID_LOGGED by the next entry; those after the last are pending."""
    import anyio

    from stella_shared.evidence.verify import verify_chain
    from stella_shared.evidence.vouching import Trust

    with surroundings(2) as around:
        queue = Queue(tmp_path, around, small_chain(tmp_path))

        async def submit() -> None:
            await queue.round(every=3)

        anyio.run(submit)
        root = around.services().root
    report = verify_chain(queue.node.evidence, trust=Trust({queue.node.key.key_id: ""}, root=root))
    assert [(c.status, c.logged_by) for c in report.chunks] == [
        ("VALID_LOGGED", 1),
        ("VALID_LOGGED", 3),
        ("VALID_LOGGED", 3),
        ("VALID_PENDING", None),
    ]
    strict = verify_chain(queue.node.evidence, trust=Trust({queue.node.key.key_id: ""}, root=root), require_log=True)
    assert [("not_logged", 4)] == [(fault.code, fault.chunk) for fault in strict.faults]


async def test_a_window_that_ends_after_it_was_seen_is_told(tmp_path: Path) -> None:
    """A node whose clock was ahead, or who wrote other times, is found out by the timestamp."""
    from stella_shared.evidence.verify import verify_chain
    from stella_shared.evidence.vouching import Trust

    with surroundings(2) as around:
        node = small_chain(tmp_path)
        store = node.open()
        store._now = lambda: "2999-01-01T00:00:00.000000000Z"
        store.close("age")
        store.release()
        await Queue(tmp_path, around, node).round()
        trust = Trust({node.key.key_id: ""}, root=around.services().root)
    report = verify_chain(node.evidence, trust=trust)
    assert report.valid
    assert [w.chunk for w in report.warnings if w.code == "clock_ahead"] == [5]
