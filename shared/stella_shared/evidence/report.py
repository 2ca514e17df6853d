"""What `verify-chain` answers: for programs as a Struct (stable JSON), for people as text."""

from __future__ import annotations

from typing import Final

import msgspec

from stella_shared.evidence.records import Accounting, Note, Predecessor
from stella_shared.evidence.transparency.certificate import Identity

#: Every fault code, and what it means.
FAULT_CODES: Final = {
    "missing": "a file, or a whole chunk, is not there",
    "edited": "bytes differ from what the signed statement says",
    "reordered": "a chunk's statement says that it belongs at another place of this chain",
    "inserted": "something is there that no signer of this chain put there",
    "truncated": "the chain ends before the newest statement that is known",
    "forked": "two histories: a link or the head names another statement than the one that is here",
    "spliced": "a statement or a line comes from another chain or another node",
    "unknown_key": "signed with a key that is not trusted",
    "untrusted_time": "signed with a certificate, and nobody trusted says when",
    "bad_signature": "the signature does not fit statement and key",
    "bundle_mismatch": "statement, chunk, log entry, timestamp or certificate do not describe the same thing",
    "identity_broken": "produced = recorded + filtered + lost does not hold, or lanes do not continue",
    "malformed": "not of the form that the format demands",
    "not_canonical": "the right value in another text than the canonical one",
    "unsigned": "nothing here is signed",
    "not_logged": "no entry of a trusted log vouches for it, and --require-log asks for one",
}

VALID_LOGGED: Final = "VALID_LOGGED"
VALID_PENDING: Final = "VALID_PENDING"
TIME_UNTRUSTED: Final = "TIME_UNTRUSTED"
INVALID: Final = "INVALID"
UNTRUSTED_KEY: Final = "UNTRUSTED_KEY"
UNSIGNED: Final = "UNSIGNED"
ARCHIVED: Final = "ARCHIVED"
STATUSES: Final = (VALID_LOGGED, VALID_PENDING, TIME_UNTRUSTED, ARCHIVED, UNTRUSTED_KEY, UNSIGNED, INVALID)


class Fault(msgspec.Struct, frozen=True):
    """One way in which the evidence is not what it claims.  `chunk` is None when it concerns the whole."""

    code: str
    chunk: int | None
    message: str
    hint: str = ""


class Warning(msgspec.Struct, frozen=True):
    """Something to know that is no fault."""

    code: str
    chunk: int | None
    message: str


class ChunkReport(msgspec.Struct, frozen=True):
    """One chunk.  `status`:

    VALID_LOGGED    signed by somebody trusted, in a trusted log, at a trusted time
    VALID_PENDING   signed by somebody trusted, and in no log that is known here
    TIME_UNTRUSTED  as VALID_LOGGED, but nobody trusted says when
    ARCHIVED        a signed note says that its lines were cleaned up; all else of it holds
    UNTRUSTED_KEY   signed by somebody who is not trusted
    UNSIGNED        closed and not signed yet
    INVALID         it has a fault

    `logged_by` is the chunk whose log entry vouches for it: itself, or a later one that follows from it.
    """

    index: int
    status: str
    lines: int = 0
    bytes: int = 0
    start: str = ""
    end: str = ""
    close_reason: str = ""
    key_id: str = ""
    chunk_sha256: str = ""
    statement_sha256: str = ""
    accounting: Accounting | None = None
    identity: Identity | None = None
    trusted_time: str = ""
    log: str = ""
    log_index: int | None = None
    logged_by: int | None = None


class Archived(msgspec.Struct, frozen=True):
    """How much of the chain has links, signatures and accounting here, and its lines elsewhere."""

    chunks: int
    lines: int
    bytes: int


class ChunkNote(msgspec.Struct, frozen=True):
    """A note and the chunk that records it."""

    chunk: int
    note: Note


class OpenChunk(msgspec.Struct, frozen=True):
    """The chunk still being written: nothing is promised about it yet."""

    index: int
    bytes: int


class HeadCheck(msgspec.Struct, frozen=True):
    """What the end of the chain was compared with; `source` is empty when there was nothing."""

    source: str = ""
    index: int = 0
    statement_sha256: str = ""


class ChainReport(msgspec.Struct, frozen=True):
    """The answer about a chain.  `valid` is true when there is no fault at all.

    `lines` and `bytes` count every chunk, the archived ones too.  `state` says how much of the chain is here:
    `complete`, `range` (chunks `first` to `last`, as a signed manifest declares), `gap`, `forked`, `truncated`.
    """

    format: int
    valid: bool
    path: str
    chain_id: str
    node: str
    created: str
    predecessor: Predecessor | None
    state: str
    first: int
    last: int
    totals: Accounting
    lost_by_cause: dict[str, int]
    filtered_by_cause: dict[str, int]
    lines: int
    bytes: int
    archived: Archived
    notes: list[ChunkNote]
    chunks: list[ChunkReport]
    open: OpenChunk | None
    head: HeadCheck
    trusted_keys: list[str]
    trusted_identities: list[Identity]
    trusted_root_sha256: str
    faults: list[Fault]
    warnings: list[Warning]


def encode_report(report: ChainReport) -> bytes:
    """Return the report as indented JSON with the fields in their declared order, newline at the end."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def _log_line(report: ChainReport, statuses: list[str]) -> str:
    """Return the line about the transparency log."""
    own = [chunk for chunk in report.chunks if chunk.log]
    entries = [chunk.log_index for chunk in own if chunk.log_index is not None]
    parts = [f"{statuses.count(VALID_LOGGED)} logged", f"{statuses.count(VALID_PENDING)} pending"]
    if untrusted := statuses.count(TIME_UNTRUSTED):
        parts.append(f"{untrusted} at a time nobody vouches for")
    return f"  Log: {', '.join(parts)}; {own[-1].log}, entries {min(entries)} to {max(entries)}"


def _seen(chunk: ChunkReport) -> str:
    """Return when somebody trusted saw a chunk's signature, and where it is logged."""
    seen = f"  seen {chunk.trusted_time}" if chunk.trusted_time else ""
    if chunk.log:
        return f"{seen}  entry {chunk.log_index} of {chunk.log}"
    return f"{seen}  by chunk {chunk.logged_by}" if chunk.logged_by else seen


_FAULTS_SHOWN = 10


def _place(chunk: int | None) -> str:
    return f"chunk {chunk}" if chunk is not None else "chain"


def _note(told: ChunkNote) -> str:
    note = told.note
    span = f" of chunks {note.first} to {note.last}" if note.first else ""
    return f"chunk {told.chunk}: {_plain(f'{note.kind}{span} at {note.at}: {note.text}'.removesuffix(': '))}"


def _plain(text: str) -> str:
    """Return text of the evidence in a form that cannot drive a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:400])


def render_text(report: ChainReport, verbose: bool = False) -> str:
    """Return the report for people.  The first line is exactly `Chain Status: ✓ VALID` or `… ✗ INVALID`."""
    out = [f"Chain Status: {'✓ VALID' if report.valid else '✗ INVALID'}"]
    if report.faults:
        first = report.faults[0]
        out.append(
            f"  Error: Chain broken at chunk {first.chunk}" if first.chunk is not None else f"  Error: {first.message}"
        )
        if first.chunk is not None:
            out.append(f"  Reason: {first.message} ({first.code})")
        if first.hint:
            out.append(f"  Hint: {first.hint}")
    statuses = [chunk.status for chunk in report.chunks]
    signed = sum(statuses.count(status) for status in (VALID_LOGGED, VALID_PENDING, ARCHIVED))
    signed += statuses.count(TIME_UNTRUSTED) if report.valid else 0
    sums = report.totals
    if report.chain_id:
        out.append(f"  Chain: {report.chain_id} of node {report.node}, since {report.created}")
    if (before := report.predecessor) is not None:
        known = (
            f"chain {before.chain_id} up to chunk {before.index}" if before.chain_id else "a chain that is not known"
        )
        out.append(f"  Follows: {known}: {_plain(before.reason)}")
    if report.state == "range":
        out.append(f"  State: range, chunks {report.first} to {report.last}, as a signed manifest declares")
    else:
        out.append(f"  State: {report.state}")
    out.append(f"  Chunks: {signed} valid of {len(report.chunks)}; {report.lines} events, {report.bytes} bytes")
    if any(chunk.log for chunk in report.chunks):
        out.append(_log_line(report, statuses))
    if report.archived.chunks:
        out.append(
            f"  Archived: {report.archived.chunks} of these chunks, {report.archived.lines} events: links, signatures"
            " and accounting hold; their lines are not here"
        )
    out.append(
        f"  Accounting: {sums.produced} produced = {sums.recorded} recorded + {sums.filtered} filtered"
        f" + {sums.lost} lost"
    )
    out += [f"    lost {cause}: {n}" for cause, n in sorted(report.lost_by_cause.items()) if n]
    if report.open:
        out.append(f"  Open: chunk {report.open.index}, {report.open.bytes} bytes, not signed yet")
    if report.head.source:
        out.append(f"  Head: the end was compared with {report.head.source} (chunk {report.head.index})")
    shown = report.faults if verbose else report.faults[:_FAULTS_SHOWN]
    if len(report.faults) > 1:
        out.append("  Faults:")
        out += [f"    {_place(f.chunk)}: {f.code}: {f.message}" for f in shown]
        if len(shown) < len(report.faults):
            out.append(f"    … {len(report.faults) - len(shown)} more (--verbose shows all)")
    out += [f"  Note: {_note(told)}" for told in report.notes]
    out += [f"  Warning: {_place(w.chunk)}: {w.message}" for w in report.warnings]
    if verbose:
        out += [f"    filtered {cause}: {n}" for cause, n in sorted(report.filtered_by_cause.items()) if n]
        out += [f"  Trusted key: sha256:{key}" for key in report.trusted_keys]
        out += [f"  Trusted identity: {who.subject} (by {who.issuer})" for who in report.trusted_identities]
        if report.trusted_root_sha256:
            out.append(f"  Trusted root: sha256:{report.trusted_root_sha256}")
        out += [
            f"  {c.index:06d}  {c.status:<14}  {c.lines:>9} lines  {c.bytes:>11} bytes  {c.close_reason:<8}  "
            f"{c.start} … {c.end}" + _seen(c)
            for c in report.chunks
        ]
    return "\n".join(out) + "\n"
