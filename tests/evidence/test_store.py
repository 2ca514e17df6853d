"""`initialise`: makes what is missing, keeps what is there, refuses what nobody can have left by accident."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chain_maker import Node, small_chain

from stella_shared import config
from stella_shared.errors import ConfigError, NotFound, NotPermitted
from stella_shared.evidence import keys
from stella_shared.evidence.store import initialise, places, read_chain, read_head


def test_a_fresh_node_gets_directories_key_and_chain(tmp_path: Path) -> None:
    """Everything is made, the private key for its owner alone, and outside the evidence."""
    signals = config.load(None, {}, {"output_directory": str(tmp_path / "evidence"), "node": "n"})
    made = initialise(signals)
    where = places(signals)
    assert (made.new_chain, made.new_key, made.predecessor) == (True, True, None)
    assert (where.state / "keys" / "signing.key").stat().st_mode & 0o777 == 0o600
    assert where.state.stat().st_mode & 0o777 == 0o700
    assert {made.key_id} == set(keys.load_trusted(where.state))
    assert [made.key_id + ".pem"] == [p.name for p in (where.evidence / "keys").iterdir()]
    assert not list(where.evidence.rglob("*.key"))


def test_doing_it_again_changes_nothing(tmp_path: Path) -> None:
    """Not one byte, with chunks or without."""
    node = small_chain(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = initialise(node.signals)
    assert (False, False, node.made.chain_id) == (again.new_chain, again.new_key, again.chain_id)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_emptied_evidence_begins_a_chain_that_names_the_old_one(tmp_path: Path) -> None:
    """As the runbook's emergency procedure does it: clear, init, start; the new chain verifies at once."""
    node = small_chain(tmp_path)
    head = read_head(node.where)
    assert head is not None
    for path in node.evidence.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = initialise(node.signals)
    assert again.predecessor is not None
    assert (node.made.chain_id, 4, head.statement_sha256) == (
        again.predecessor.chain_id, again.predecessor.index, again.predecessor.statement_sha256
    )  # fmt: skip
    assert again.chain_id != node.made.chain_id
    assert (False, node.made.key_id) == (again.new_key, again.key_id)
    node.open().release()
    report = node.verify()
    assert report.valid
    assert again.predecessor == report.predecessor


@pytest.mark.parametrize("name", ["keys", "trusted.json", "pem"])
def test_what_a_crash_left_half_done_is_completed(tmp_path: Path, name: str) -> None:
    """Key, public key and trust are completed from the private key."""
    node = Node(tmp_path)
    match name:
        case "keys":
            shutil.rmtree(node.where.state / "keys")
            next((node.evidence / "keys").iterdir()).unlink()
        case "trusted.json":
            (node.where.state / "keys" / "trusted.json").unlink()
        case _:
            next((node.evidence / "keys").iterdir()).unlink()
    again = initialise(node.signals)
    node.open().release()
    assert node.verify().valid
    assert (again.key_id == node.made.key_id) == (name != "keys")


def _no_manifest(node: Node) -> None:
    (node.evidence / "chain.json").unlink()


def _broken_manifest(node: Node) -> None:
    (node.evidence / "chain.json").write_bytes(b"{}")


def _no_key(node: Node) -> None:
    (node.where.state / "keys" / "signing.key").unlink()


def _broken_key(node: Node) -> None:
    (node.where.state / "keys" / "signing.key").write_bytes(b"oops")


def _broken_trust(node: Node) -> None:
    (node.where.state / "keys" / "trusted.json").write_bytes(b"[]")


def _other_node(node: Node) -> None:
    node.signals = config.load(None, {}, {"output_directory": str(node.evidence), "node": "other"})


def _not_a_directory(node: Node) -> None:
    shutil.rmtree(node.evidence)
    node.evidence.write_text("a file")


def _broken_head(node: Node) -> None:
    shutil.rmtree(node.evidence)
    node.where.head.write_bytes(b"{")


@pytest.mark.parametrize(
    "damage",
    [
        _no_manifest, _broken_manifest, _no_key, _broken_key, _broken_trust, _other_node, _not_a_directory,
        _broken_head,
    ],
)  # fmt: skip
def test_damage_is_refused_with_the_fix(tmp_path: Path, damage: object) -> None:
    """What no crash of ours leaves is not papered over."""
    node = small_chain(tmp_path)
    damage(node)  # type: ignore[operator]
    with pytest.raises(ConfigError) as refused:
        initialise(node.signals)
    assert refused.value.hint


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """The hint is the command that helps."""
    node = Node(tmp_path)
    path = node.where.state / "keys" / "signing.key"
    path.chmod(0o640)
    with pytest.raises(NotPermitted) as refused:
        keys.load_local_key(node.where.state)
    assert f"chmod 600 {path}" in refused.value.hint


def test_keys_are_found_or_said_to_be_missing(tmp_path: Path) -> None:
    """No key, no second key over the first, no key of another kind."""
    with pytest.raises(NotFound):
        keys.load_local_key(tmp_path)
    node = Node(tmp_path)
    with pytest.raises(ConfigError):
        keys.create_local_key(node.where.state)
    assert read_chain(tmp_path) is None
    with pytest.raises(ValueError, match=r"not canonical|no public key"):
        keys.load_public(next((node.evidence / "keys").iterdir()).read_bytes() + b"\n")
