"""Batches in any order, twice, cut in parts, or never: the identity holds, and each line is there once."""

from __future__ import annotations

import io

import msgspec
import pytest
from chain_maker import BOOT, COVERAGE, RUN, Source, line, parts_of
from hypothesis import given, settings
from hypothesis import strategies as st

from stella_shared.evidence import merkle, records
from stella_shared.evidence.compressed import FrameReader, Packed, pack, unpack
from stella_shared.evidence.records import Ledger, Window
from stella_shared.wire import Closing, LaneRow, decode_head, encode_head
from stella_shared.wire import Ledger as BatchLedger
from stella_signer import journal
from stella_signer.account import REPLACED, Account
from stella_signer.intake import Intake, Verdict
from stella_signer.patience import Patience, at_the_end
from stella_signer.steps import Finish, GiveUp, Settle

NODE = "node-a"


def ledger_of(account: Account) -> Ledger:
    return Ledger(
        1, "c", 2, "", account.lines, 0, "", "", Window("", "", account.boots()), "size", account.runs(),
        account.ended_runs(), account.filtered, account.lost, account.coverage(), [],
    )  # fmt: skip


def check(account: Account, before: Ledger | None = None) -> Ledger:
    """Hold what verification holds: the identity, and that lanes continue."""
    ledger = ledger_of(account)
    assert records.identity_faults(ledger) == []
    standing = records.standing_after(before.runs if before else [], before.ended_runs if before else [])
    assert records.continuity_faults(standing, ledger, may_pick_up=False) == []
    return ledger


def next_chunk(ledger: Ledger) -> Account:
    return Account(ledger.runs, ledger.ended_runs, ledger.coverage)


def lines_in(body: Packed) -> list[bytes]:
    """Return the lines of a batch's frames."""
    return b"".join(FrameReader(io.BytesIO(body.frames)).frames()).splitlines()


# -- the whole way: parts in disorder ----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_disorder_repetition_and_loss_are_all_accounted_for(data: st.DataObject) -> None:
    """Any order, any repetition, any missing batch, chunks closed at any time: nothing twice, all counted."""
    source = Source(NODE)
    made = [
        source.batch(
            data.draw(st.dictionaries(st.integers(0, 3), st.integers(0, 3), max_size=3)),
            filtered=0, kernel_filtered=data.draw(st.integers(0, 2)), final=number == 7,
        )
        for number in range(8)
    ]  # fmt: skip
    missing = data.draw(st.sets(st.integers(0, 6), max_size=3))
    parts = [
        part
        for step, body in made
        if step.number not in missing
        for part in parts_of(step, body, data.draw(st.integers(1, 3)))
    ]
    parts += data.draw(st.lists(st.sampled_from(parts), max_size=6)) if parts else []
    order = data.draw(st.permutations(parts))
    account = Account([], [], [])

    def is_settled(run: str, number: int) -> bool:
        return account.is_settled(run, number)  # of whichever chunk is open

    intake: Intake[int] = Intake(NODE, is_settled, lambda run: None)
    before: Ledger | None = None
    lines, chunks = [], []
    for handle, (head, body) in enumerate(order):
        intake.offer(decode_head(encode_head(head)), body, handle)
        if data.draw(st.booleans()):
            for batch in intake.take():
                account.apply(batch.step)
                lines += lines_in(batch.body)
        if not account.early() and data.draw(st.integers(0, 5)) == 0:
            before = check(account, before)
            chunks.append(before)
            account = next_chunk(before)
    for batch in intake.take():
        account.apply(batch.step)
        lines += lines_in(batch.body)
    while steps := at_the_end(account):
        for step in steps:
            account.apply(step)
    chunks.append(check(account, before))
    here = [step for step, _ in made if step.number not in missing]
    assert sorted(b for step, body in made if step.number not in missing for b in body.splitlines()) == sorted(lines)
    assert sum(step.lines for step in here) == sum(chunk.lines for chunk in chunks)
    # The final batch has no rows for lanes it did not use, so a hole at their end is not seen; others are.
    seen = {row.lane: row.next for step in here for row in step.ledger.lanes}
    lost = sum(chunk.lost.get("bus", 0) for chunk in chunks)
    assert sum(seen.values()) - len(lines) == lost


def test_a_batch_in_time_is_not_lost() -> None:
    """A batch may come after later ones; it is settled in its place and nothing is missing."""
    source = Source(NODE)
    first, second, third = (source.batch({0: 2})[0] for _ in range(3))
    account = Account([], [], [])
    for step in (third, first):
        account.apply(step)
    assert (account.early(), account.holes()) == (1, {RUN: (1, 2)})
    account.apply(second)
    ledger = check(account)
    assert (ledger.lost, ledger.runs[0].missing, ledger.runs[0].next_batch) == ({}, [], 3)


def test_a_missing_batch_is_lost_on_the_bus_and_stays_lost() -> None:
    """Its numbers are counted, its number is listed, and its late arrival changes nothing."""
    source = Source(NODE)
    first, second, third = (source.batch({0: 2})[0] for _ in range(3))
    account = Account([], [], [])
    for step in (first, third, GiveUp(RUN, 2), second):
        account.apply(step)
    ledger = check(account)
    assert (ledger.lost, ledger.runs[0].missing, ledger.lines) == ({"bus": 2}, [(1, 2)], 4)
    assert account.found_lost == {"bus": 2}


# -- runs that end without a final batch -------------------------------------------------------------------------


def _next_run(closings: list[Closing] | None = None, since_ns: int = 9000) -> Source:
    return Source(NODE, "f" * 16, since_ns=since_ns)


def test_a_closing_tells_what_a_restart_lost() -> None:
    """What the dead run had taken and nobody settled is lost, cause `restart`; its kernel filters are added."""
    old, new = Source(NODE), _next_run()
    account = Account([], [], [])
    account.apply(old.batch({0: 2, 1: 1}, kernel_filtered=3)[0])
    closing = Closing(RUN, BOOT, {0: 5, 1: 1, 6: 4}, {"kernel_path": 10, "kernel_target": 1})
    account.apply(new.batch({0: 1}, closings=[closing])[0])
    assert account.superseded() == [RUN]
    account.apply(Finish(RUN))
    ledger = check(account)
    assert ledger.lost == {"restart": 7}
    assert ledger.filtered == {"kernel_path": 10, "kernel_target": 1}
    run = ledger.runs[0]
    assert (run.ended, run.final, run.unclean) == (True, False, "")
    assert next_chunk(ledger).ended_runs() == [RUN]


def test_a_late_batch_of_a_dead_run_is_settled_before_its_end() -> None:
    """A batch that an enricher still held when the next run began is no loss."""
    old, new = Source(NODE), _next_run()
    early, late = old.batch({0: 2})[0], old.batch({0: 3})[0]
    account = Account([], [], [])
    for step in (early, new.batch({}, closings=[Closing(RUN, BOOT, {0: 5}, {})])[0], late, Finish(RUN)):
        account.apply(step)
    assert check(account).lost == {}


def test_a_closing_with_a_reason_marks_the_run_unclean() -> None:
    """The cause is known, the number is not, and no number is made up."""
    account = Account([], [], [])
    account.apply(Source(NODE).batch({0: 2})[0])
    closing = Closing(RUN, BOOT, {}, {}, "the machine was reset")
    account.apply(_next_run().batch({}, closings=[closing])[0])
    account.apply(Finish(RUN))
    ledger = check(account)
    assert (ledger.runs[0].unclean, ledger.lost) == ("the machine was reset", {})


def test_a_run_that_is_replaced_without_a_closing_is_unclean() -> None:
    """Nobody tells what it had counted, and the ledger says so."""
    account = Account([], [], [])
    account.apply(Source(NODE).batch({0: 2})[0])
    account.apply(_next_run().batch({})[0])
    account.apply(Finish(RUN))
    assert check(account).runs[0].unclean == REPLACED


def test_a_late_run_does_not_replace_a_newer_one() -> None:
    """Batch 0 of an old run may come after that of its successor; the clock of the boot tells which is which."""
    account = Account([], [], [])
    account.apply(_next_run().batch({})[0])
    account.apply(Source(NODE).batch({0: 2}, final=True)[0])
    assert account.superseded() == []
    assert account.live() == ["f" * 16]


def test_a_run_that_was_never_seen_is_counted_from_its_closing() -> None:
    """It died before its first batch came: all it took is lost."""
    account = Account([], [], [])
    account.apply(_next_run().batch({}, closings=[Closing(RUN, BOOT, {4: 6}, {})])[0])
    account.apply(Finish(RUN))
    assert check(account).lost == {"restart": 6}


def test_what_waits_is_carried_into_the_next_chunk() -> None:
    """A pending closing survives a chunk's end, and a restart of the signer, which reads it from the ledger."""
    account = Account([], [], [])
    account.apply(Source(NODE).batch({0: 2})[0])
    account.apply(_next_run().batch({}, closings=[Closing(RUN, BOOT, {0: 5}, {})])[0])
    before = check(account)
    account = next_chunk(msgspec.convert(msgspec.to_builtins(before, str_keys=True), Ledger, str_keys=True))
    account.apply(Finish(RUN))
    assert check(account, before).lost == {"restart": 3}


def test_coverage_is_kept_once_and_carried() -> None:
    """The same document again is not listed again, and what held at the end holds at the next start."""
    source = Source(NODE)
    account = Account([], [], [])
    for _ in range(3):
        account.apply(source.batch({}, coverage=COVERAGE)[0])
    assert account.coverages == 1
    account = next_chunk(check(account))
    account.apply(source.batch({}, coverage=COVERAGE)[0])
    account.apply(source.batch({}, coverage='{"probes":[]}')[0])
    assert [int(held.since_ns) for held in account.coverage()] == [1000, 1040]


def test_broken_lanes_are_noted_and_show() -> None:
    """A collector that counts a number twice is not helped out: the identity breaks, and the run says where."""
    account = Account([], [], [])
    for number in range(2):
        ledger = BatchLedger(1, 2, [LaneRow(0, 0, 2, 2, 0, 0)], {}, {})
        account.apply(Settle(BOOT, RUN, number, 2, ledger, "", False, []))
    broken = ledger_of(account)
    assert records.identity_faults(broken)
    assert "lane 0 starts at 0, 2 was next" in broken.runs[0].unclean


# -- patience ----------------------------------------------------------------------------------------------------


def test_patience_ends_after_a_minute() -> None:
    """A hole has sixty seconds from when it was first seen."""
    source = Source(NODE)
    steps = [source.batch({0: 1})[0] for _ in range(3)]
    account, patience = Account([], [], []), Patience()
    account.apply(steps[0])
    account.apply(steps[2])
    assert patience.due(account, 100.0) == []
    assert patience.due(account, 159.0) == []
    assert [GiveUp(RUN, 2)] == patience.due(account, 160.0)
    account.apply(GiveUp(RUN, 2))
    assert patience.due(account, 161.0) == []


def test_a_followed_run_ends_a_minute_after_its_last_sign_of_life() -> None:
    """Each late batch begins the minute again."""
    old = Source(NODE)
    account, patience = Account([], [], []), Patience()
    account.apply(old.batch({0: 1})[0])
    account.apply(_next_run().batch({})[0])
    assert patience.due(account, 0.0) == []
    account.apply(old.batch({0: 1})[0])
    assert patience.due(account, 61.0) == []
    assert [Finish(RUN)] == patience.due(account, 122.0)


# -- intake ------------------------------------------------------------------------------------------------------


def _intake() -> Intake[str]:
    return Intake(NODE, lambda run, number: False, lambda run: BOOT if run == RUN else None)


def test_parts_make_a_batch_and_the_first_copy_wins() -> None:
    """Every delivery is acknowledged with the batch, and none before it."""
    step, body = Source(NODE).batch({0: 4})
    (head0, body0), (head1, body1) = parts_of(step, body, 2)
    intake = _intake()
    assert intake.offer(head0, body0, "a") == Verdict.KEPT
    assert intake.offer(head0, pack(b"".join(line(NODE, 9, 9) for _ in range(2))), "b") == Verdict.KEPT
    assert (intake.incomplete, intake.complete) == (1, 0)
    assert intake.offer(head1, body1, "c") == Verdict.KEPT
    assert Verdict.KEPT == intake.offer(head1, body1, "d")
    (batch,) = intake.take()
    assert (body0 + body1, ["a", "b", "c", "d"]) == (batch.body.frames, batch.handles)
    assert merkle.leaf_hashes(unpack(body0) + unpack(body1)) == batch.body.leaves
    assert intake.take() == []


def test_lines_that_are_not_all_there_are_lost_in_the_signer() -> None:
    """When an honest ledger tells of more lines than came, none is kept and each is counted."""
    step, body = Source(NODE).batch({0: 3}, lost=1)
    ((head, _),) = parts_of(step, body, 1)
    short = body.splitlines(keepends=True)[:2]
    intake = _intake()
    intake.offer(msgspec.structs.replace(head, lines=2), pack(b"".join(short)), "a")
    (batch,) = intake.take()
    account = Account([], [], [])
    account.apply(batch.step)
    assert check(account).lost == {"ring_full": 1, "signer": 3}
    assert Packed() == batch.body


@pytest.mark.parametrize(
    "change",
    [
        {"node": "node-b"},
        {"part": 3},
        {"parts": 1000},
        {"number": -1},
        {"lines": 7},
        {"boot_id": "c" * 32},
        {"run": ""},
        {"ledger": None},
        {"ledger": BatchLedger(0, 0, [LaneRow(0, 0, 9, 3, 0, 0)], {}, {})},
        {"ledger": BatchLedger(-1, 0, [], {}, {})},
        {"ledger": BatchLedger(0, 0, [LaneRow(0, 0, 0, 0, 0, 0)] * 2, {}, {})},
        {"ledger": BatchLedger(0, 0, [LaneRow(0, 2**60, 2**60, 0, 0, 0)], {}, {})},
        {"ledger": BatchLedger(0, 0, [], {"odd": 1}, {})},
        {"ledger": BatchLedger(0, 0, [], {"kernel_" + "x" * 99: 1}, {})},
        {"coverage": "{"},
        {"coverage": "[]"},
        {"closings": [Closing("r", "b", {0: -1}, {})]},
    ],
    ids=str,
)
def test_parts_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    """Every number and text from the bus is bounded before it gets near the evidence."""
    step, body = Source(NODE).batch({0: 3})
    ((head, _),) = parts_of(step, body, 1)
    intake = _intake()
    assert intake.offer(msgspec.structs.replace(head, **change), body, "a") == Verdict.REFUSED
    assert intake.last_refusal


# -- the journal -------------------------------------------------------------------------------------------------


def _entries() -> list[journal.Opening | journal.Commit]:
    steps = [Source(NODE).batch({0: 1}, closings=[Closing("r", "b", {1: 2}, {"kernel_path": 3})])[0], GiveUp(RUN, 4)]
    return [
        journal.Opening(1, "c", 2, "now"),
        journal.Commit(10, b"\0" * 32, "now", [*steps, Finish(RUN)]),
        journal.Commit(20, b"\1" * 32, "later", []),
    ]


def test_the_journal_comes_back() -> None:
    """All entries, and where each ends."""
    entries = _entries()
    framed = [journal.frame(entry) for entry in entries]
    replay = journal.replay(b"".join(framed))
    assert (entries[0], entries[1:]) == (replay.opening, replay.commits)
    assert [len(framed[0] + framed[1]), sum(map(len, framed))] == replay.sizes


@given(st.data())
def test_a_torn_or_damaged_journal_ends_before_the_damage(data: st.DataObject) -> None:
    """A cut, or a flipped byte, anywhere: what stands before it is read, what follows is nothing."""
    framed = [journal.frame(entry) for entry in _entries()]
    whole = bytearray(b"".join(framed))
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        del whole[at:]
    replay = journal.replay(bytes(whole))
    ends = [sum(map(len, framed[: i + 1])) for i in range(3)]
    intact = sum(end <= at for end in ends)
    assert intact == (replay.opening is not None) + len(replay.commits)


@given(st.binary(max_size=200))
def test_anything_at_all_is_a_journal_without_entries(data: bytes) -> None:
    """Random bytes never raise."""
    assert journal.replay(data).commits == []
