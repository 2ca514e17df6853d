"""Leaving a chain: at every step that it dies, doing it again ends in one old chain aside and one new chain."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from chain_maker import Node, small_chain
from faulty_disk import FaultyDisk, Killed

from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence import reset
from stella_shared.evidence.store import initialise, read_chain, read_head, signer_lock
from stella_shared.evidence.verify import verify_chain


def leave(node: Node, reason: str = "a new disk", disk: FaultyDisk | None = None) -> None:
    reset.begin(node.evidence, node.where.state, reason, disk)
    initialise(node.signals, disk)


def asides(node: Node) -> list[Path]:
    return sorted(p for p in node.evidence.parent.iterdir() if p.name.startswith("evidence-"))


def expect_left(node: Node, reason: str = "a new disk") -> None:
    """The old chain verifies where it is now, the new one names it and goes on."""
    (aside,) = asides(node)
    assert aside.name.startswith(f"evidence-{node.made.chain_id[:8]}-")
    assert verify_chain(aside, trusted_keys={node.made.key_id}).valid
    chain = read_chain(node.evidence)
    assert chain is not None and chain.predecessor is not None
    assert chain.chain_id != node.made.chain_id
    assert (node.made.chain_id, 4, reason) == (
        chain.predecessor.chain_id, chain.predecessor.index, chain.predecessor.reason
    )  # fmt: skip
    assert reset.pending(node.where.state) is None
    store = node.open()
    store.close("age")
    store.release()
    assert node.verify().valid
    # The head is the new chain's by now: the old one is asked about its own end no more, and says so.
    left = verify_chain(aside)
    assert (True, ["no_head"]) == (left.valid, [warning.code for warning in left.warnings])
    assert {("spliced", None)} == {(f.code, f.chunk) for f in verify_chain(aside, head=node.where.head).faults}


def test_a_reset_moves_the_old_chain_and_names_it(tmp_path: Path) -> None:
    """The new chain's predecessor is the newest statement, with the reason."""
    node = small_chain(tmp_path)
    head = read_head(node.where)
    leave(node)
    chain = read_chain(node.evidence)
    assert head and chain and chain.predecessor and head.statement_sha256 == chain.predecessor.statement_sha256
    expect_left(node)


@pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
def test_a_death_at_any_step_is_completed_by_init(tmp_path: Path, after: bool) -> None:
    """With the first reason kept; before the first step is durable nothing has happened."""
    count = FaultyDisk()
    leave(small_chain(tmp_path / "count"), disk=count)
    for at in range(count.steps):
        node = small_chain(tmp_path / str(at))
        disk = FaultyDisk(at, after=after, seed=at)
        with pytest.raises(Killed):
            leave(node, disk=disk)
        disk.power_cut()
        if reset.pending(node.where.state) is None and not asides(node):
            assert node.verify().valid, at
            leave(node, "another reason")
            expect_left(node, "another reason")
            continue
        initialise(node.signals)
        expect_left(node)


def test_a_head_that_is_behind_or_damaged_is_made_anew_from_the_evidence(tmp_path: Path) -> None:
    """The new chain names what was really signed last."""
    for damage in (b"{", None):
        node = small_chain(tmp_path / str(damage))
        node.where.head.unlink() if damage is None else node.where.head.write_bytes(damage)
        leave(node)
        expect_left(node)


@pytest.mark.parametrize("files", [["chain.json"], ["chain.json", "000004.dsse.json"], ["000004.ledger.json"]])
def test_damaged_evidence_can_be_left(tmp_path: Path, files: list[str]) -> None:
    """Unreadable documents are moved aside like all else; what the state still knows is named."""
    node = small_chain(tmp_path)
    for name in files:
        (node.evidence / name).write_bytes(b"{")
    leave(node)
    chain = read_chain(node.evidence)
    assert chain and chain.predecessor
    assert (node.made.chain_id, 4) == (chain.predecessor.chain_id, chain.predecessor.index)
    assert b"{" == (asides(node)[0] / files[0]).read_bytes()
    node.open().release()
    assert node.verify().valid


def test_when_nothing_is_known_the_reason_still_is(tmp_path: Path) -> None:
    """Without head and without a readable chain the new one says only why."""
    node = small_chain(tmp_path)
    node.where.head.write_bytes(b"[]")
    for path in node.evidence.glob("*.json"):
        path.write_bytes(b"{")
    leave(node)
    chain = read_chain(node.evidence)
    assert chain and chain.predecessor
    assert ("", 0, "a new disk") == (chain.predecessor.chain_id, chain.predecessor.index, chain.predecessor.reason)
    assert [b"[]"] == [p.read_bytes() for p in node.where.state.glob("head.json.evidence-unknown-*")]
    node.open().release()
    assert node.verify().valid


def test_an_envelope_of_another_key_is_not_believed(tmp_path: Path) -> None:
    """Who can write to the evidence alone does not choose the predecessor."""
    node = small_chain(tmp_path)
    other = small_chain(tmp_path / "other")
    for kind in ("dsse.json", "ledger.json"):
        shutil.copy(other.file(4, kind), node.file(9, kind))
    shutil.copytree(other.evidence / "keys", node.evidence / "keys", dirs_exist_ok=True)
    found = reset.newest_head(node.evidence, node.where.state)
    assert found is not None
    assert (node.made.chain_id, 4) == (found.chain_id, found.index)


def test_a_signer_at_work_keeps_its_chain(tmp_path: Path) -> None:
    """Nothing is moved under it."""
    node = small_chain(tmp_path)
    reset.begin(node.evidence, node.where.state, "x")
    store = node.open()
    with pytest.raises(TryAgain):
        initialise(node.signals)
    with pytest.raises(TryAgain), signer_lock(node.where):
        pass
    assert [] == asides(node)
    store.release()
    initialise(node.signals)
    assert 1 == len(asides(node))


def test_a_mount_point_is_left_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed; the fix is named, and init completes it with the reason."""
    node = small_chain(tmp_path)

    class Mounted(FaultyDisk):
        def rename(self, old: Path, new: Path) -> None:
            if old == node.evidence:
                raise OSError(errno.EBUSY, "Device or resource busy", str(old))
            super().rename(old, new)

    with pytest.raises(ConfigError, match="another file system") as refused:
        leave(node, disk=Mounted())
    assert "stella signals init" in refused.value.hint
    for path in node.evidence.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    initialise(node.signals)
    chain = read_chain(node.evidence)
    assert chain and chain.predecessor and chain.predecessor.reason == "a new disk"


def test_a_damaged_reset_file_is_told(tmp_path: Path) -> None:
    """With the file and the fix."""
    node = small_chain(tmp_path)
    (node.where.state / reset.RESET).write_bytes(b"{")
    with pytest.raises(ConfigError, match=r"reset\.json") as refused:
        initialise(node.signals)
    assert refused.value.hint
