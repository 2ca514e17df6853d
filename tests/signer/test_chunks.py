"""The failure table: at every durable step the signer dies, or the disk fails; the chain verifies, nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from chain_maker import COVERAGE, Node, Source, one, packed, small_chain
from faulty_disk import FaultyDisk, Killed

from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence.store import initialise
from stella_signer.chunks import ChunkStore
from stella_signer.steps import Settle

Batches = list[tuple[Settle, bytes]]
#: After which batches a chunk is closed.
CLOSE_AFTER = {1, 4}


def batches(node: str) -> Batches:
    source = Source(node)
    counts = [({0: 3}, 1), ({0: 2, 7: 1}, 0), ({7: 4}, 2), ({}, 0), ({0: 1}, 0), ({3: 2, 0: 2}, 0)]
    return [
        source.batch(recorded, lost=lost if recorded else 0, kernel_filtered=i, coverage=COVERAGE, final=i == 5)
        for i, (recorded, lost) in enumerate(counts)
    ]


def again(work: Callable[[], None]) -> None:
    """Do `work` as the app does: while the disk refuses, again."""
    for _ in range(5):
        try:
            return work()
        except OSError:
            continue
    raise AssertionError("the disk refuses for ever")


def feed(store: ChunkStore, told: Batches, acknowledged: set[int]) -> None:
    """Bring every batch that is not in the evidence, as the bus does with what was not acknowledged."""
    for step, body in told:
        if not store.account.is_settled(step.run, step.number):
            again(lambda step=step, body=body: store.commit([step], [packed(body)]))  # type: ignore[misc]
            acknowledged.add(step.number)
            if step.number in CLOSE_AFTER:
                again(lambda: store.close("size"))
    again(lambda: store.close("stop"))


def open_again(node: Node, disk: FaultyDisk) -> ChunkStore:
    for _ in range(5):
        try:
            return node.open(disk)
        except OSError:
            continue
    raise AssertionError("the disk refuses for ever")


def live(node: Node, disk: FaultyDisk, acknowledged: set[int]) -> None:
    store = open_again(node, disk)
    try:
        feed(store, batches(node.name), acknowledged)
    finally:
        store.release()


def expect_all(node: Node) -> None:
    report = node.verify()
    assert report.faults == []
    assert report.lines == 15
    assert (
        report.totals.produced, report.totals.recorded, report.totals.filtered, report.totals.lost
    ) == (33, 15, 15, 3)  # fmt: skip
    assert [w for w in report.warnings if w.code != "left_over"] == []


def steps_of_a_life(tmp_path: Path) -> int:
    disk = FaultyDisk()
    node = Node(tmp_path / "count", disk=FaultyDisk())
    live(node, disk, set())
    expect_all(node)
    return disk.steps


@pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
def test_a_death_at_any_step_loses_nothing(tmp_path: Path, after: bool) -> None:
    """Killed at each step, with a power cut: what was acknowledged is there, all else is taken again, once."""
    for at in range(steps_of_a_life(tmp_path)):
        node = Node(tmp_path / str(at), disk=FaultyDisk())
        disk = FaultyDisk(at, after=after, seed=at)
        acknowledged: set[int] = set()
        with pytest.raises(Killed):
            live(node, disk, acknowledged)
        disk.power_cut()
        before = node.verify()
        # Between crash and restart the chain verifies too, unless nothing was signed yet.
        assert {f.code for f in before.faults} <= {"unsigned"}, at
        store = node.open(FaultyDisk())
        kept = {n for n in range(6) if store.account.is_settled(batches(node.name)[0][0].run, n)}
        assert acknowledged <= kept, at
        feed(store, batches(node.name), set())
        store.release()
        expect_all(node)


@pytest.mark.parametrize("after", [False, True], ids=["undone", "reported-lost"])
def test_an_error_at_any_step_is_survived(tmp_path: Path, after: bool) -> None:
    """The disk is full for one step; the same call again goes on, and the chain is whole."""
    for at in range(steps_of_a_life(tmp_path)):
        node = Node(tmp_path / str(at), disk=FaultyDisk())
        live(node, FaultyDisk(at, kill=False, after=after, seed=at), set())
        expect_all(node)


def test_an_error_and_then_a_death_are_survived(tmp_path: Path) -> None:
    """A full disk first, a kill a few steps later."""
    for at in range(0, steps_of_a_life(tmp_path), 3):
        node = Node(tmp_path / str(at), disk=FaultyDisk())

        disk = FaultyDisk(at, kill=False, after=True, seed=at, then_kill_after=4)
        try:
            live(node, disk, set())
        except Killed:
            disk.power_cut()
        store = node.open(FaultyDisk())
        feed(store, batches(node.name), set())
        store.release()
        expect_all(node)


def test_init_is_completed_after_a_death_at_any_step(tmp_path: Path) -> None:
    """`initialise` dies at each of its steps; called again, it leaves a node that works."""
    for at in range(40):
        folder = tmp_path / str(at)
        node = Node(folder)
        shutil.rmtree(folder)
        disk = FaultyDisk(at)
        try:
            initialise(node.signals, disk)
        except Killed:
            disk.power_cut()
        else:
            break
        initialise(node.signals)
        node.open().release()
        assert node.verify().valid
    else:
        raise AssertionError("initialise has more steps than thought")


def test_recovery_closes_what_was_open(tmp_path: Path) -> None:
    """The chunk that a dead signer left is closed as it was acknowledged, reason `recovery`."""
    node = Node(tmp_path)
    store = node.open()
    told = batches(node.name)
    store.commit(*one(told[0]))
    store.release()
    with node.file(2, "open.ndjson.zst").open("ab") as file:
        file.write(b'{"torn":')
    with node.file(2, "open.journal").open("ab") as file:
        file.write(b"\x40\0\0\0torn")
    node.open().release()
    report = node.verify()
    assert report.valid
    assert [(c.close_reason, c.lines) for c in report.chunks] == [("genesis", 0), ("recovery", 3)]


def test_recovery_waits_for_a_batch_that_others_wait_for(tmp_path: Path) -> None:
    """A chunk with a hole is not closed: the missing batch is on the bus still, and comes again."""
    node = Node(tmp_path)
    store = node.open()
    told = batches(node.name)
    store.commit(*one(told[0]))
    store.commit(*one(told[2]))
    store.release()
    for _ in range(2):
        store = node.open()
        assert (store.index, store.recovering, store.account.early()) == (2, True, 1)
        assert store.is_settled(told[2][0].run, 2)
        store.release()
    store = node.open()
    feed(store, told, set())
    store.release()
    expect_all(node)


def test_data_that_the_disk_lost_is_not_signed(tmp_path: Path) -> None:
    """The journal tells of data that is gone: the chunk ends before it, and the store says how much is gone."""
    node = Node(tmp_path)
    store = node.open()
    told = batches(node.name)
    store.commit(*one(told[0]))
    store.commit(*one(told[1]))
    store.release()
    path = node.file(2, "open.ndjson.zst")
    path.write_bytes(path.read_bytes()[:-1])
    store = node.open()
    assert store.commits_gone == 1
    assert not store.account.is_settled(told[1][0].run, 1)
    store.release()
    assert node.verify().valid


def test_two_signers_cannot_share_a_chain(tmp_path: Path) -> None:
    """The second one is told to try again."""
    node = Node(tmp_path)
    first = node.open()
    with pytest.raises(TryAgain):
        node.open()
    first.release()
    node.open().release()


def test_removed_evidence_is_noticed(tmp_path: Path) -> None:
    """Nothing is acknowledged into a file that is gone."""
    node = Node(tmp_path)
    store = node.open()
    told = batches(node.name)
    store.commit(*one(told[0]))
    node.file(2, "open.ndjson.zst").unlink()
    for _ in range(2):
        with pytest.raises(OSError, match="removed under the running signer"):
            store.commit(*one(told[1]))
    with pytest.raises(OSError, match="removed under the running signer"):
        store.close("stop")
    store.release()


@pytest.mark.parametrize("damage", ["tail", "middle", "ledger", "head", "journal", "data"])
def test_damage_is_refused(tmp_path: Path, damage: str) -> None:
    """A signer never writes on beside a history that was longer, or that is not whole."""
    node = small_chain(tmp_path)
    match damage:
        case "tail":
            for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
                node.file(4, kind).unlink()
        case "middle":
            node.file(3, "ndjson.zst").unlink()
        case "ledger":
            node.file(4, "ledger.json").write_bytes(b"{}")
        case "head":
            other = small_chain(tmp_path / "other", "node-b")
            node.where.head.write_bytes(other.where.head.read_bytes())
        case "journal":
            node.file(5, "open.ndjson.zst").write_bytes(b"x\n")
        case "data":
            node.file(4, "dsse.json").unlink()
            node.where.head.unlink()
            node.file(4, "ndjson.zst").write_bytes(b"x\n")
    with pytest.raises(ConfigError) as refused:
        node.open()
    assert refused.value.hint


@pytest.mark.parametrize("lost", ["removed", "behind"])
def test_the_head_is_rebuilt(tmp_path: Path, lost: str) -> None:
    """head.json is a function of the newest chunk: the same bytes come back."""
    node = small_chain(tmp_path)
    head = node.where.head.read_bytes()
    if lost == "removed":
        node.where.head.unlink()
    else:
        older = small_chain(tmp_path / "older")
        content = msgspec.json.decode(older.where.head.read_bytes()) | {"chain_id": node.made.chain_id, "index": 3}
        node.where.head.write_bytes(msgspec.json.encode(content, order="sorted"))
    node.open().release()
    assert head == node.where.head.read_bytes()


def test_sealed_chunks_are_signed_when_signing_is_switched_on(tmp_path: Path) -> None:
    """Without a key the ledgers still form a chain; with one, all of it is signed in order."""
    node = Node(tmp_path)
    store = ChunkStore.open(node.where, None, version="0", now=node.clock)
    for batch in batches(node.name):
        store.commit(*one(batch))
        store.close("size")
    store.release()
    assert {("unsigned", None)} == node.codes()
    node.open().release()
    expect_all(node)


_CHILD = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from pathlib import Path
from chain_maker import Node, Source, one
node = Node(Path(sys.argv[2]))
store = node.open()
source = Source(node.name, sys.argv[3])
print("ready", flush=True)
while True:
    store.commit(*one(source.batch({0: 20, 1: 5})))
    print(source.number, flush=True)
    if source.number % 7 == 0:
        store.close("size")
"""


def test_a_real_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A real process, a real SIGKILL at any moment, five times over the same chain."""
    path = ":".join(sys.path)
    told: dict[str, int] = {}
    for life in range(5):
        run = f"{life:016x}"
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, path, str(tmp_path), run], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        time.sleep(0.05 + 0.03 * life)
        os.kill(child.pid, signal.SIGKILL)
        numbers = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        told[run] = int(numbers[-1]) if numbers else 0
        node = Node(tmp_path)
        assert set() == {f.code for f in node.verify().faults}
    node = Node(tmp_path)
    store = node.open()
    for run, count in told.items():
        assert count == 0 or store.account.is_settled(run, count - 1)
    store.close("stop")
    store.release()
    report = node.verify()
    assert report.valid
    assert report.lines >= 25 * sum(told.values())
