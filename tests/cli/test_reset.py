"""`stella signals reset-chain` and the runbook's emergency procedure, with the real command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chain_kit import Site

from stella_shared.evidence.store import places, signer_lock


def test_a_reset_is_said_first_and_done_with_confirm(tmp_path: Path) -> None:
    """Exit code 2 and nothing moved; then the old chain is aside, and the new one says why."""
    site = Site(tmp_path)
    done = site.stella("reset-chain")
    assert (2, True) == (done.returncode, "would move" in done.stderr)
    assert site.report()["valid"]
    said = site.good("reset-chain", "--confirm", "--reason", "disk was replaced")
    (aside,) = (p for p in tmp_path.iterdir() if p.name.startswith(f"evidence-{site.node.made.chain_id[:8]}-"))
    assert f"old evidence   {aside}" in said and "up to chunk 4: disk was replaced" in said
    assert "Chain Status: ✓ VALID" in site.good("verify-chain", aside)
    # The head that is there is the old chain's: nothing of the new one was compared with it.
    assert {"source": "", "index": 0, "statement_sha256": ""} == site.report()["head"]
    site.node.open().release()
    report = site.report()
    assert (True, site.node.made.chain_id, "disk was replaced") == (
        report["valid"], report["predecessor"]["chain_id"], report["predecessor"]["reason"]
    )  # fmt: skip
    assert "Follows: chain" in site.good("verify-chain", site.evidence)


def test_a_reset_refuses_while_a_signer_runs_and_where_nothing_is(tmp_path: Path) -> None:
    """Exit code 10 while it is held, 4 for an empty place; nothing is moved."""
    site = Site(tmp_path)
    with signer_lock(places(site.node.signals)):
        assert 10 == site.stella("reset-chain", "--confirm").returncode
    assert site.report()["valid"]
    empty = Site(tmp_path / "empty", chain=False)
    assert 4 == empty.stella("reset-chain", "--confirm").returncode
    assert 2 == site.stella("reset-chain", "--confirm", "--reason", "two\nlines").returncode


def test_the_old_chain_is_ended_first(tmp_path: Path) -> None:
    """What a dead signer left open is closed and signed before the evidence goes aside."""
    site = Site(tmp_path)
    from chain_maker import Source, one

    store = site.node.open()
    store.commit(*one(Source("node-a", "f" * 16).batch({0: 2})))
    store.release()
    said = site.good("reset-chain", "--confirm")
    assert "up to chunk 5: reset by the operator" in said


def test_the_emergency_procedure(tmp_path: Path) -> None:
    """Clear the evidence with rm, init, go on: as the runbook has it."""
    site = Site(tmp_path)
    shutil.copytree(site.evidence, tmp_path / "evidence.backup")
    for path in site.evidence.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "(new chain)" in site.good("init")
    site.node.open().release()
    report = site.report()
    assert (True, site.node.made.chain_id, 4, "the evidence directory was emptied") == (
        report["valid"],
        report["predecessor"]["chain_id"],
        report["predecessor"]["index"],
        report["predecessor"]["reason"],
    )


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("evidence/chain.json", "stella signals reset-chain --confirm"),
        ("state/head.json", "head.json.corrupt"),
        ("state/keys/trusted.json", "remove it and run: stella signals init"),
    ],
)
def test_init_says_exactly_what_is_corrupt_and_the_fix(tmp_path: Path, name: str, fix: str) -> None:
    """Exit code 2, the path of the file, and a command that works."""
    site = Site(tmp_path)
    (tmp_path / name).write_bytes(b"{")
    done = site.stella("init")
    assert 2 == done.returncode
    assert str(tmp_path / name) in done.stderr and fix in done.stderr
    match name:
        case "evidence/chain.json":
            site.good("reset-chain", "--confirm")
        case "state/head.json":
            (tmp_path / name).rename(tmp_path / f"{name}.corrupt")
            site.good("init")
        case _:
            (tmp_path / name).unlink()
            site.good("init")
    site.node.open().release()
    assert site.report()["valid"]
