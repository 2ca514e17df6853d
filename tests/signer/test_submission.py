"""Signed chunks reach the log: once each, whatever fails on the way, and nothing is believed unproved."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.signer.log_kit import Queue, surroundings
from tests.sigstore.door import Reply

from stella_shared.evidence import names
from stella_shared.evidence.disk import Disk
from stella_signer.submission import REJECTED

pytestmark = pytest.mark.anyio
BOTH = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])


@BOTH
async def test_every_signed_chunk_is_logged_once_and_proved(tmp_path: Path, version: int) -> None:
    """A round logs all chunks; each bundle proves its log entry and a trusted time; the next round finds nothing."""
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        done, _ = await queue.round()
        assert (done.logged, done.left, done.error) == (4, 0, "")
        assert queue.logged() == [1, 2, 3, 4]
        for index in queue.logged():
            proof = queue.proof(index)
            assert len(proof.logged) == 1 and proof.times
        again, _ = await queue.round()
        assert (again.logged, again.left) == (0, 0)


@BOTH
async def test_a_lost_reply_is_found_again(tmp_path: Path, version: int) -> None:
    """The log took the entry and the answer was lost: the next try gets 409, fetches the entry, and proves it."""
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        around.log.drop_replies(1)
        first, _ = await queue.round(parallel=1)
        assert first.error and queue.logged() == []
        done, _ = await queue.round()
        assert done.error == "" and queue.logged() == [1, 2, 3, 4]
        assert queue.proof(1).logged[0].index == 0


@BOTH
async def test_an_outage_leaves_everything_where_it_was(tmp_path: Path, version: int) -> None:
    """With the log away nothing is lost and the reason is told; when it is back the same bytes are submitted."""
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        envelopes = [queue.node.file(n, names.ENVELOPE).read_bytes() for n in range(1, 5)]
        around.log.down()
        failed, submitter = await queue.round(parallel=1)
        assert failed.error == "connection refused" and failed.after_seconds >= 0 and failed.left == 4
        assert submitter.failures_total == 1
        around.log.up()
        done, _ = await queue.round()
        assert done.logged == 4
        assert envelopes == [queue.node.file(n, names.ENVELOPE).read_bytes() for n in range(1, 5)]


async def test_a_log_that_asks_for_patience_gets_it(tmp_path: Path) -> None:
    """429 with Retry-After is a passing failure that says how long to wait at least."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.fail_next(1, 429, {"Retry-After": "17"})
        done, _ = await queue.round()
        assert done.after_seconds >= 17 and done.rejected == 0


async def test_a_refusal_is_parked_and_tried_again_on_request(tmp_path: Path) -> None:
    """400 parks a chunk with the log's reason; the others go on; `resubmit-pending` tries it again."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.fail_next(1, 400)
        done, submitter = await queue.round(parallel=1)
        assert (done.logged, done.rejected) == (3, 1)
        assert list(submitter.rejected()) == [1] and "HTTP 400" in submitter.rejected()[1]
        skipped, _ = await queue.round()
        assert skipped.logged == 0
        retried, submitter = await queue.round(retry_rejected=True)
        assert retried.logged == 1 and submitter.rejected() == {}
        assert json.loads((queue.node.where.state / REJECTED).read_text())["chunks"] == {}


class _NoList(Disk):
    """A disk that does not take the list of refused chunks."""

    def rename(self, old: Path, new: Path) -> None:
        if new.name == REJECTED:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))
        super().rename(old, new)


async def test_a_refusal_that_cannot_be_noted_is_a_failure_and_no_end(tmp_path: Path) -> None:
    """The disk is full as a refused chunk is to be parked: the round tells so, and the next one parks it."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.fail_next(2, 400)
        done, submitter = await queue.round(disk=_NoList(), parallel=1)
        assert "No space left" in done.error and submitter.rejected() == {}
        done, submitter = await queue.round(parallel=1)
        assert (done.rejected, list(submitter.rejected())) == (1, [1])


async def test_a_logged_chunk_never_stays_in_the_list_of_refused_ones(tmp_path: Path) -> None:
    """It leaves the list before its bundle is there, so no crash between the two leaves it listed for ever."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.fail_next(1, 400)
        await queue.round(parallel=1)
        done, submitter = await queue.round(disk=_NoList(), retry_rejected=True)
        assert "No space left" in done.error and list(submitter.rejected()) == [1] and 1 not in queue.logged()
        done, submitter = await queue.round(retry_rejected=True)
        assert done.error == "" and submitter.rejected() == {} and queue.logged() == [1, 2, 3, 4]


async def test_a_log_that_closes_as_its_proof_is_asked_for_is_a_failure_and_no_end(tmp_path: Path) -> None:
    """405 to a question ends the round with its reason; the bundle waits."""
    with surroundings(1) as around:
        queue = Queue(tmp_path, around)
        await queue.round(parallel=1, most=1)
        around.log.grow(2, api=1)
        around.log.fail_next(1, 405, on="v1.proof")
        done, _ = await queue.round(parallel=1)
        assert "405" in done.error and queue.logged() == [1]


async def test_a_closed_log_is_passed_over(tmp_path: Path) -> None:
    """405 closes a log for good; with no other one the trust configuration is asked for anew."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.freeze()
        done, submitter = await queue.round()
        assert done.logged == 0 and "closed" in done.error and submitter.needs_new_services


async def test_the_log_may_be_read_elsewhere(tmp_path: Path) -> None:
    """A v2 log that is written to at one place and read at another: a lost reply is found by the tiles there."""
    with surroundings(2, separate_reads=True) as around:
        queue = Queue(tmp_path, around)
        around.log.drop_replies(1)
        await queue.round(parallel=1, read_url=around.log.read_url)
        done, _ = await queue.round(read_url=around.log.read_url)
        assert done.error == "" and queue.logged() == [1, 2, 3, 4]


@BOTH
async def test_two_histories_are_found_out(tmp_path: Path, version: int) -> None:
    """A log that shows another past than before is not believed: no bundle, an alarm, and no more submissions."""
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        around.log.grow(20, api=version)
        queue.node.file(4, names.ENVELOPE).rename(tmp_path / "later")
        assert (await queue.round())[0].logged == 3
        (tmp_path / "later").rename(queue.node.file(4, names.ENVELOPE))
        around.log.split_view(api=version)
        done, submitter = await queue.round()
        assert "two histories" in submitter.alarm and done.logged == 0 and queue.logged() == [1, 2, 3]
        assert (await submitter.round()).error == submitter.alarm


@BOTH
@pytest.mark.parametrize("what", ["root", "hash", "checkpoint", "body", "index", "log"])
async def test_a_lying_answer_is_never_kept(tmp_path: Path, version: int, what: str) -> None:
    """Whatever the log gets wrong in its answer, no bundle is written, and the chunk stays in the queue."""
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        around.log.grow(3, api=version)

        def lie(endpoint: str, reply: Reply) -> Reply:
            if not endpoint.endswith(".submit") or reply.status not in (200, 201):
                return reply
            return reply.with_json(_falsified(reply.json(), what, version))

        around.log.tamper(lie)
        done, _ = await queue.round()
        assert done.error and queue.logged() == [] and done.left == 4
        around.log.tamper(None)
        assert (await queue.round())[0].error == "" and queue.logged() == [1, 2, 3, 4]


def _falsified(answer: Any, what: str, version: int) -> Any:
    entry = next(iter(answer.values())) if version == 1 else answer
    proof = entry["verification"]["inclusionProof"] if version == 1 else entry["inclusionProof"]
    other = "00" * 32 if version == 1 else "A" * 43 + "="
    match what:
        case "root":
            proof["rootHash"] = other
        case "hash":
            proof["hashes"][0] = other
        case "checkpoint":
            text = proof["checkpoint"] if version == 1 else proof["checkpoint"]["envelope"]
            size = text.split("\n")[1]
            text = text.replace(f"\n{size}\n", f"\n{int(size) + 1}\n", 1)
            proof["checkpoint"] = text if version == 1 else {"envelope": text}
        case "body":
            entry["body" if version == 1 else "canonicalizedBody"] = "e30="
        case "index":
            proof["logIndex"] = 0 if version == 1 else "0"
        case "log":
            if version == 1:
                entry["logID"] = other
            else:
                entry["logId"] = {"keyId": other}
    return answer


async def test_timestamps_come_from_every_authority(tmp_path: Path) -> None:
    """Two authorities give two timestamps; they are kept before the log is asked, and not asked for twice."""
    with surroundings(2, tsas=2) as around:
        queue = Queue(tmp_path, around)
        around.log.down()
        await queue.round(parallel=1)
        kept = queue.node.file(1, names.STAMPS).read_bytes()
        around.log.up()
        await queue.round()
        assert queue.node.file(1, names.STAMPS).read_bytes() == kept
        assert len(queue.proof(1).times) == 2


@pytest.mark.parametrize("wrong", ["wrong_nonce", "wrong_digest"])
async def test_a_timestamp_of_something_else_is_refused(tmp_path: Path, wrong: str) -> None:
    """A reply to another question, by nonce or by digest, is not kept; the next one is."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        getattr(around.tsas[0], wrong)(1)
        done, _ = await queue.round(parallel=1)
        assert "timestamp" in done.error and not queue.node.file(1, names.STAMPS).exists()
        assert (await queue.round())[0].logged == 4


async def test_only_some_chunks_are_submitted_when_asked(tmp_path: Path) -> None:
    """`submit_every: 3` logs the first chunk and every third; what is before a logged one is vouched for by it."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        done, _ = await queue.round(every=3)
        assert done.left == 0 and queue.logged() == [1, 3]


async def test_two_submitters_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    """The node and `resubmit-pending` at once: every chunk is logged exactly once."""
    import anyio

    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(queue.round)
            tasks.start_soon(queue.round)
        assert queue.logged() == [1, 2, 3, 4]
        assert around.log.requests["v2.submit"] == 4


async def test_unknown_cosignatures_are_kept_and_passed_over(tmp_path: Path) -> None:
    """Witness lines on a checkpoint do not disturb, and stand in the bundle as the log gave them."""
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        around.log.witness_lines = ["— witness.example/w1 " + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="]
        await queue.round()
        assert b"witness.example" in queue.bundle(1) and queue.proof(1).logged


async def test_a_failing_authority_is_stood_in_for(tmp_path: Path) -> None:
    """With the selector ANY one timestamp is enough, and the next authority gives it when the first does not."""
    with surroundings(2, tsas=2, selector="ANY") as around:
        queue = Queue(tmp_path, around)
        around.tsas[0].down()
        assert (await queue.round())[0].logged == 4
        assert len(queue.proof(1).times) == 1


async def test_two_logs_give_two_entries(tmp_path: Path) -> None:
    """With the selector ALL a chunk goes to every log, and its bundle holds and proves each entry."""
    with surroundings(2) as around, surroundings(1, tsas=0) as other:
        around.others.append(other)
        queue = Queue(tmp_path, around)
        assert (await queue.round())[0].logged == 4
        assert [e.log for e in queue.proof(2).logged] == [around.log.host, other.log.host]
