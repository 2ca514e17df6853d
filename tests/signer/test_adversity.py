"""What else happens to a signer: full and read-only disks, torn files, old backups, clocks that jump."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chain_maker import COVERAGE, Node, Source, one, packed, small_chain
from faulty_disk import FaultyDisk
from tests.signer.log_kit import Queue, surroundings

from stella_shared import clock
from stella_shared.errors import ConfigError
from stella_shared.evidence import names
from stella_shared.evidence.compressed import frames_of, pack
from stella_shared.evidence.keys import load_trusted
from stella_shared.evidence.report import VALID_LOGGED
from stella_shared.evidence.vouching import Trust
from stella_signer import journal
from stella_signer.chunks import ChunkStore
from stella_signer.steps import Settle

ROOT = Path(__file__).parents[2]


# -- real file systems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "kind"),
    [("full", "tmpfs"), ("full", "ext4"), ("read-only", "ext4")],
    ids=["full-tmpfs", "full-ext4", "read-only-ext4"],
)
def test_a_real_disk_that_refuses_loses_nothing(tmp_path: Path, what: str, kind: str) -> None:
    """Nothing is acknowledged that is not there; the chain verifies meanwhile; when the disk is back, it goes on."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.signer.real_disk"]
    done = subprocess.run(
        [*command, what, kind, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- torn files --------------------------------------------------------------------------------------------------------


def _two_commits(node: Node) -> tuple[list[tuple[Settle, bytes]], list[int]]:
    """Commit two batches and die; return both, and the lengths of data and journal before the second."""
    source = Source(node.name)
    told = [source.batch({0: 2}, coverage=COVERAGE), source.batch({5: 1}, lost=1, final=True)]
    store = node.open(FaultyDisk())
    store.commit(*one(told[0]))
    before = [node.file(2, kind).stat().st_size for kind in (names.OPEN_DATA, names.OPEN_JOURNAL)]
    store.commit(*one(told[1]))
    store.release()
    return told, before


def _every_line_once(node: Node, told: list[tuple[Settle, bytes]]) -> None:
    report = node.verify()
    assert report.faults == []
    assert (report.lines, report.totals.lost) == (3, 1)
    here = b"".join(frame for path in sorted(node.evidence.glob(f"*.{names.DATA}")) for frame in frames_of(path))
    assert here == told[0][1] + told[1][1]


@pytest.mark.parametrize("kind", [names.OPEN_DATA, names.OPEN_JOURNAL], ids=["data", "journal"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "more"])
def test_a_torn_end_is_cut_off_at_every_byte(tmp_path: Path, kind: str, damage: str) -> None:
    """Cut, flipped or written on at each byte of the last commit: what is whole is kept, the rest comes again."""
    made = Node(tmp_path / "made")
    told, before = _two_commits(made)
    whole = made.file(2, kind).read_bytes()
    start = before[0 if kind == names.OPEN_DATA else 1]
    assert len(whole) - start > 50
    # A flipped byte of the data is found by its digest, wherever it is.
    ends = range(start, len(whole), 9 if (damage, kind) == ("flipped", names.OPEN_DATA) else 1)
    for at in ends if damage != "more" else range(1, 64, 3):
        folder = tmp_path / "now"
        shutil.copytree(made.evidence.parent, folder)
        node = Node(folder)
        match damage:
            case "cut":
                torn = whole[:at]
            case "flipped":
                torn = whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :]
            case _:
                # What was being written when it died: the beginning of another commit.
                torn = whole + (pack(told[0][1]) if kind == names.OPEN_DATA else whole[start:])[:at]
        node.file(2, kind).write_bytes(torn)
        store = node.open(FaultyDisk())
        settled = [store.is_settled(step.run, step.number) for step, _ in told]
        assert settled == [True, damage == "more"], at
        for step, body in told:
            if not store.is_settled(step.run, step.number):
                store.commit([step], [packed(body)])
        store.close("stop")
        store.release()
        _every_line_once(node, told)
        shutil.rmtree(folder)


def test_a_commit_that_was_never_synced_may_be_half_there(tmp_path: Path) -> None:
    """The journal tells of it and the data is short, at every byte: the commit counts as gone, and is told."""
    made = Node(tmp_path / "made")
    told, before = _two_commits(made)
    replayed = journal.replay(made.file(2, names.OPEN_JOURNAL).read_bytes())
    assert [commit.offset for commit in replayed.commits] == [before[0], made.file(2, names.OPEN_DATA).stat().st_size]
    for at in range(before[0], replayed.commits[1].offset, 7):
        folder = tmp_path / "now"
        shutil.copytree(made.evidence.parent, folder)
        node = Node(folder)
        os.truncate(node.file(2, names.OPEN_DATA), at)
        store = node.open(FaultyDisk())
        assert store.commits_gone == 1
        store.commit(*one(told[1]))
        store.close("stop")
        store.release()
        _every_line_once(node, told)
        shutil.rmtree(folder)


# -- backups -----------------------------------------------------------------------------------------------------------


def _write_on(node: Node, run: str) -> None:
    """Write another chunk of another run."""
    store = node.open()
    store.commit(*one(Source(node.name, run).batch({0: 2}, final=True)))
    store.close("size")
    store.release()


def test_an_old_backup_of_the_evidence_is_refused(tmp_path: Path) -> None:
    """The head in the state directory tells of more: nothing is written, and with the newer evidence it goes on."""
    node = small_chain(tmp_path)
    backup, newer = tmp_path / "backup", tmp_path / "newer"
    shutil.copytree(node.evidence, backup)
    _write_on(node, "1" * 16)
    node.evidence.rename(newer)
    shutil.copytree(backup, node.evidence)
    with pytest.raises(ConfigError, match="ends at chunk 4, but chunk 5 was signed before") as refused:
        node.open()
    assert "restore the evidence" in refused.value.hint
    assert ("truncated", 5) in node.codes()
    assert sorted(p.name for p in backup.iterdir()) == sorted(p.name for p in node.evidence.iterdir())
    shutil.rmtree(node.evidence)
    newer.rename(node.evidence)
    _write_on(node, "2" * 16)
    assert node.verify().valid


def test_an_old_backup_of_everything_is_found_out_by_a_head_kept_elsewhere(tmp_path: Path) -> None:
    """Nothing on the node can know; whoever holds a later head sees the cut, and after new chunks the fork."""
    node = small_chain(tmp_path / "node")
    shutil.copytree(tmp_path / "node", tmp_path / "backup")
    _write_on(node, "1" * 16)
    pinned = tmp_path / "pinned.json"
    shutil.copy(node.where.head, pinned)
    shutil.rmtree(tmp_path / "node")
    (tmp_path / "backup").rename(tmp_path / "node")
    assert {("truncated", 5)} == node.codes(head=pinned)
    _write_on(node, "2" * 16)
    assert node.verify().valid
    assert {("forked", 5)} == node.codes(head=pinned)
    _write_on(node, "3" * 16)
    assert {("forked", 5)} == node.codes(head=pinned)


@pytest.mark.anyio
async def test_an_old_backup_of_everything_is_found_out_by_a_later_bundle(tmp_path: Path) -> None:
    """A bundle of the history that was lost does not fit the new one, and the log holds both."""
    with surroundings(2) as around:
        queue = Queue(tmp_path / "node", around)
        node = queue.node
        await queue.round()
        shutil.copytree(tmp_path / "node", tmp_path / "backup")
        _write_on(node, "1" * 16)
        await queue.round()
        kept = node.file(5, names.BUNDLE).read_bytes()
        shutil.rmtree(tmp_path / "node")
        (tmp_path / "backup").rename(tmp_path / "node")
        _write_on(node, "2" * 16)
        # The log only grew, so the old memory of it holds, and the node goes on by itself.
        done, submitter = await queue.round()
        assert (done.logged, done.error, submitter.alarm) == (1, "", "")
        trust = Trust(dict.fromkeys(load_trusted(node.where.state), ""), root=around.services().root)
        report = node.verify(trust=trust)
        assert report.valid and {VALID_LOGGED} == {chunk.status for chunk in report.chunks}
        assert around.log.v2.tree.size == 6
        node.file(5, names.BUNDLE).write_bytes(kept)
        assert {("bundle_mismatch", 5)} == node.codes(trust=trust)


@pytest.mark.anyio
async def test_an_old_backup_without_bundles_gets_them_again(tmp_path: Path) -> None:
    """The same bytes are submitted again: the log says that it has them, and nothing is entered twice."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        await queue.round()
        for index in (2, 3):
            queue.node.file(index, names.BUNDLE).unlink()
        done, _ = await queue.round()
        assert (done.logged, done.error, around.log.v2.tree.size) == (2, "", 4)


# -- clocks ------------------------------------------------------------------------------------------------------------


def _jumping(*seconds: int) -> Callable[[], str]:
    """Return a clock that shows these times in turn, again and again."""
    times = itertools.cycle(seconds)
    return lambda: clock.utc_text(next(times) * 10**9)


@pytest.mark.parametrize(
    "now",
    [
        _jumping(1_700_000_000, 1_600_000_000),
        _jumping(0, 4_000_000_000, 1_700_000_000),
        _jumping(1_700_000_000),
    ],
    ids=["back", "far-apart", "standing"],
)
def test_a_clock_that_jumps_breaks_nothing(tmp_path: Path, now: Callable[[], str]) -> None:
    """Times inform; order comes from digests and numbers.  A crash in the middle changes nothing in that."""
    node = Node(tmp_path)
    source = Source(node.name)

    def opened() -> ChunkStore:
        return ChunkStore.open(node.where, node.key, version="0.1.0", now=now)

    for _ in range(3):
        store = opened()
        store.commit(*one(source.batch({0: 2}, coverage=COVERAGE)))
        store.close("age")
        store.commit(*one(source.batch({0: 1})))
        store.release()
    store = opened()
    store.close("stop")
    store.release()
    report = node.verify()
    assert report.valid and report.lines == 9
