"""Notes and cleanup on real chains: whatever dies on the way, a note stands once and the chain verifies."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain_maker import Node, Source, one, small_chain
from faulty_disk import FaultyDisk, Killed
from tests.signer.log_kit import logged

from stella_shared.errors import ConfigError, UsageError
from stella_shared.evidence import canonical, names, notes
from stella_shared.evidence.cleanup import Cleanup, Span, age_seconds, spans
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.report import ARCHIVED, ChainReport, render_text
from stella_signer import errands

LATER = "2030-01-01T00:00:00.000000000Z"


def noted(report: ChainReport) -> list[tuple[int, str]]:
    return [(told.chunk, told.note.kind) for told in report.notes]


def cleanup(node: Node, disk: Disk | None = None, *, before: str = LATER, must_be_logged: bool = False) -> Cleanup:
    """Clean up as the command does, with the signer's part done in between."""
    report = node.verify()
    assert report.faults == []
    plan = Cleanup(node.where, report, ended_before=before, must_be_logged=must_be_logged, disk=disk)
    for note in plan.notes():
        notes.put(node.where, node.made.chain_id, note, disk)
    store = node.open(disk)
    try:
        while store.waiting_notes():
            store.close("note")
    finally:
        store.release()
    plan.remove()
    return plan


def bare(node: Node) -> list[int]:
    """Return the chunks whose lines are gone."""
    return [n for n in range(1, 10) if node.file(n, "dsse.json").exists() and not node.file(n, "ndjson.zst").exists()]


def test_a_note_stands_in_the_next_ledger_and_its_file_goes(tmp_path: Path) -> None:
    """Whatever closes the chunk takes the notes in; the report shows them, and the signature covers them."""
    node = small_chain(tmp_path)
    note = notes.make(notes.PLANNED_GAP, text="kernel update – tonight")
    notes.put(node.where, node.made.chain_id, note)
    store = node.open()
    store.close("stop")
    store.close("age")
    store.release()
    report = node.verify()
    assert report.faults == []
    assert [(5, "planned_gap")] == noted(report)
    assert f"Note: chunk 5: planned_gap at {note.at}: kernel update – tonight" in render_text(report)
    assert [] == list(node.where.notes.iterdir())
    path = node.file(5, "ledger.json")
    path.write_bytes(path.read_bytes().replace(b"tonight", b"to-morn"))
    assert ("edited", 5) in node.codes()


def test_notes_of_another_chain_and_files_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """They neither get into the chain nor stop the signer."""
    node = small_chain(tmp_path)
    notes.put(node.where, "0" * 32, notes.make(notes.CLEANUP, first=2, last=3))
    (node.where.notes / f"{'a' * 32}.json").write_bytes(b"{")
    (node.where.notes / f"{'b' * 32}.json").mkdir()
    (node.where.notes / "other").write_bytes(b"")
    broken = notes.make("Not A Kind")
    notes.put(node.where, node.made.chain_id, broken)
    store = node.open()
    assert [] == store.waiting_notes()
    store.close("age")
    store.release()
    assert [] == noted(node.verify())


def test_more_notes_than_a_ledger_holds_wait_for_the_next(tmp_path: Path) -> None:
    """None is lost."""
    node = small_chain(tmp_path)
    for _ in range(notes.MAX_NOTES + 3):
        notes.put(node.where, node.made.chain_id, notes.make(notes.CLEANUP))
    errands.record_notes(node.signals)
    report = node.verify()
    assert report.faults == []
    assert [notes.MAX_NOTES, 3] == [sum(t.chunk == index for t in report.notes) for index in (5, 6)]


def test_cleanup_keeps_a_chain_that_verifies(tmp_path: Path) -> None:
    """Lines go, all else stays: the chunks are ARCHIVED, counted apart, and sums stay what they were."""
    node = small_chain(tmp_path)
    before = node.verify()
    plan = cleanup(node)
    assert ([2, 3], [2, 3]) == (plan.indexes, bare(node))
    report = node.verify()
    assert report.faults == []
    assert [c.status for c in report.chunks] == ["VALID_PENDING", ARCHIVED, ARCHIVED, "VALID_PENDING", "VALID_PENDING"]
    assert (2, 11) == (report.archived.chunks, report.archived.lines)
    assert before.totals == report.totals
    assert "Archived: 2 of these chunks, 11 events" in render_text(report)
    assert "cleanup of chunks 2 to 3" in render_text(report)
    # The signer goes on, and a second cleanup takes only what has become old since.
    assert [4] == cleanup(node).indexes
    assert [2, 3, 4] == bare(node)
    assert [(5, "cleanup"), (6, "cleanup")] == noted(node.verify())


def test_lines_that_come_back_are_checked_again(tmp_path: Path) -> None:
    """Put back they verify fully; changed ones are seen; and the old note lets them be removed again."""
    node = small_chain(tmp_path)
    kept = node.file(2, "ndjson.zst").read_bytes()
    cleanup(node)
    node.file(2, "ndjson.zst").write_bytes(kept)
    assert ["VALID_PENDING", ARCHIVED] == [c.status for c in node.verify().chunks[1:3]]
    node.file(2, "ndjson.zst").write_bytes(kept.replace(b'"sh"', b'"ls"', 1))
    assert {("edited", 2)} == node.codes()
    node.file(2, "ndjson.zst").write_bytes(kept)
    plan = Cleanup(node.where, node.verify(), ended_before=LATER, must_be_logged=False)
    assert [4] == [n for note in plan.notes() for n in range(note.first, note.last + 1)]
    cleanup(node)
    assert [2, 3, 4] == bare(node)


def test_what_no_note_covers_is_missing(tmp_path: Path) -> None:
    """A removal outside of the noted span is a fault, and so is one that only an earlier chunk speaks of."""
    node = small_chain(tmp_path)
    cleanup(node)
    node.file(4, "ndjson.zst").unlink()
    report = node.verify()
    assert {("missing", 4)} == {(f.code, f.chunk) for f in report.faults}
    assert "INVALID" == report.chunks[3].status
    with pytest.raises(ConfigError, match=r"000004.ndjson.zst is missing"):
        node.open()


def test_a_note_cannot_cover_its_own_chunk_or_later_ones(tmp_path: Path) -> None:
    """Else a note made today would excuse what goes missing tomorrow."""
    node = small_chain(tmp_path)
    notes.put(node.where, node.made.chain_id, notes.make(notes.CLEANUP, first=2, last=99))
    store = node.open()
    store.close("note")
    store.close("age")
    store.close("age")
    store.release()
    for index in (5, 6):
        node.file(index, "ndjson.zst").unlink()
    assert {("missing", 5), ("missing", 6)} == node.codes()


def test_an_unsigned_note_covers_nothing(tmp_path: Path) -> None:
    """Only a signed chunk vouches for a note."""
    node = small_chain(tmp_path)
    cleanup(node)
    for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
        node.file(5, kind).rename(tmp_path / kind)
    node.where.head.unlink()
    assert {("missing", 2), ("missing", 3)} == node.codes()
    (tmp_path / "ledger.json").rename(node.file(5, "ledger.json"))
    (tmp_path / "ndjson.zst").rename(node.file(5, "ndjson.zst"))
    assert {("missing", 2), ("missing", 3)} == node.codes()


@pytest.mark.parametrize("change", [{"id": "x"}, {"kind": "?"}, {"text": "a\nb"}, {"text": "x" * 201}, {"first": 3}])
def test_a_note_of_another_form_is_a_fault(tmp_path: Path, change: dict[str, object]) -> None:
    """What the signer would not have recorded is not of the format."""
    import msgspec
    from chain_maker import resign

    node = small_chain(tmp_path)
    note = msgspec.structs.replace(notes.make(notes.CLEANUP), **change)
    resign(node, 4, notes=[note])
    assert {("malformed", 4)} == node.codes()


def test_chunks_that_are_to_be_logged_stay_until_they_are(tmp_path: Path) -> None:
    """With a log configured, a chunk for which no entry vouches stays, and the plan names it.

    An entry vouches for its chunk and for all before it.
    """
    node = small_chain(tmp_path)
    logged(tmp_path, node, keep=2)
    plan = Cleanup(node.where, node.verify(), ended_before=LATER, must_be_logged=True)
    assert ([2], [3]) == (plan.indexes, plan.kept_for_the_log)
    assert [False, True, False, False] == [plan.removable(index) for index in (1, 2, 3, 4)]
    logged(tmp_path, node, keep=3)
    node.file(2, names.BUNDLE).unlink()
    plan = Cleanup(node.where, node.verify(), ended_before=LATER, must_be_logged=True)
    assert ([2, 3], []) == (plan.indexes, plan.kept_for_the_log)


def test_young_and_unsigned_chunks_stay(tmp_path: Path) -> None:
    """The window's end decides; what is not signed is never touched."""
    node = small_chain(tmp_path)
    end = node.verify().chunks[2].end
    assert [2] == Cleanup(node.where, node.verify(), ended_before=end, must_be_logged=False).indexes
    node.file(4, "dsse.json").unlink()
    node.where.head.unlink()
    plan = Cleanup(node.where, node.verify(), ended_before=LATER, must_be_logged=False)
    assert [2] == plan.indexes


def test_ages_and_spans() -> None:
    """Numbers with a unit; neighbours become one span."""
    assert [5400, 43200, 604800, 2419200] == [age_seconds(a) for a in ("90m", "12h", "7d", "4w")]
    for wrong in ("7", "d", "-1d", "7 d", "1y", "9999999d"):
        with pytest.raises(UsageError):
            age_seconds(wrong)
    assert [Span(2, 3), Span(5, 5)] == list(spans([2, 3, 5]))
    assert [] == list(spans([]))


def _life(node: Node, disk: FaultyDisk) -> None:
    """One life of a node with everything in it that notes and cleanup do."""
    store = node.open(disk)
    try:
        store.commit(*one(Source(node.name, "f" * 16).batch({0: 2}, final=True)))
        notes.put(node.where, node.made.chain_id, notes.make(notes.PLANNED_GAP, text="gap"), disk)
        store.close("stop")
    finally:
        store.release()
    cleanup(node, disk)


@pytest.mark.parametrize("after", [False, True], ids=["undone", "done"])
def test_a_death_at_any_step_leaves_a_chain_that_verifies(tmp_path: Path, after: bool) -> None:
    """Killed at each step, with a power cut: no chunk is missing, no note is recorded twice, a second go ends it."""
    count = FaultyDisk()
    _life(small_chain(tmp_path / "count"), count)
    for at in range(count.steps):
        node = small_chain(tmp_path / str(at))
        disk = FaultyDisk(at, after=after, seed=at)
        with pytest.raises(Killed):
            _life(node, disk)
        disk.power_cut()
        assert [] == node.verify().faults, at
        errands.record_notes(node.signals)
        cleanup(node, FaultyDisk())
        report = node.verify()
        assert [] == report.faults, at
        ids = [told.note.id for told in report.notes]
        assert len(set(ids)) == len(ids), at
        assert {2, 3} <= set(bare(node)), at
        ledgers = [canonical.loads(p.read_bytes(), Ledger) for p in node.evidence.glob("*.ledger.json")]
        assert {"planned_gap", "cleanup"} >= {note.kind for ledger in ledgers for note in ledger.notes}
