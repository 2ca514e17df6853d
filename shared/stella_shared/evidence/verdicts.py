"""What is said of each chunk in the end: its status, its row of the report, and who vouches for it.  Pure."""

from __future__ import annotations

import msgspec

from stella_shared.evidence import records, report
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.report import ChunkReport
from stella_shared.evidence.vouching import Vouched, earliest


def status(codes: set[str], vouched: Vouched, *, signed: bool) -> str:
    """Return a chunk's status, given the codes of its faults."""
    if codes == {"untrusted_time"}:
        return report.TIME_UNTRUSTED
    if codes == {"unknown_key"}:
        return report.UNTRUSTED_KEY
    if codes:
        return report.INVALID
    if not signed:
        return report.UNSIGNED
    if not vouched.trusted:
        return report.UNTRUSTED_KEY
    if not vouched.logged:
        return report.VALID_PENDING
    return report.VALID_LOGGED if vouched.times else report.TIME_UNTRUSTED


def chunk_report(index: int, said: str, ledger: Ledger | None, vouched: Vouched, statement_sha256: str) -> ChunkReport:
    """Return a chunk's row of the report; `said` is its status."""
    logged = vouched.logged[0] if vouched.logged else None
    who = vouched.identity
    known = ChunkReport(
        index,
        said,
        key_id=vouched.key_id,
        statement_sha256=statement_sha256,
        identity=who,
        trusted_time=earliest(vouched.times),
        log=logged.log if logged else "",
        log_index=logged.index if logged else None,
        logged_by=index if logged else None,
    )
    if ledger is None:
        return known
    return msgspec.structs.replace(
        known,
        lines=ledger.lines,
        bytes=ledger.bytes,
        start=ledger.window.start,
        end=ledger.window.end,
        close_reason=ledger.close_reason,
        chunk_sha256=ledger.sha256,
        accounting=records.accounting(ledger),
    )


def anchor(chunks: list[ChunkReport]) -> None:
    """Give the chunks before a logged one what it proves of them: it names them by digest, one by one."""
    last: ChunkReport | None = None
    for i in range(len(chunks) - 1, -1, -1):
        chunk = chunks[i]
        if chunk.log and chunk.status in (report.VALID_LOGGED, report.TIME_UNTRUSTED, report.ARCHIVED):
            last = chunk
        elif chunk.status not in (report.VALID_PENDING, report.ARCHIVED):
            last = None
        elif last is not None:
            by_entry = report.VALID_LOGGED if last.trusted_time else report.TIME_UNTRUSTED
            said = chunk.status if chunk.status == report.ARCHIVED else by_entry
            chunks[i] = msgspec.structs.replace(chunk, status=said, logged_by=last.index)
