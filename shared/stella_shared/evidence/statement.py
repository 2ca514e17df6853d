"""The in-toto Statement v1 of a chunk: a pure function of its ledger and what stood before it.

Anybody who holds the ledger can recompute every field of the statement but the chain links and the signer's
version, and `verify` does.  No paths and no arguments of events are in it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.evidence import canonical, coverage, names
from stella_shared.evidence.coverage import Btf, Probe
from stella_shared.evidence.records import Ledger, Predecessor, Window, accounting

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://stella-signals.dev/evidence-chunk/v1"
MAX_STATEMENT_BYTES: Final = 16 << 10
_UNCLEAN_MAX = 8
_BOOTS_MAX = 8
_REASON_MAX = 160


class Subject(msgspec.Struct, frozen=True):
    """What the statement is about."""

    name: str
    digest: dict[str, str]


class Previous(msgspec.Struct, frozen=True):
    """The chunk before this one."""

    index: int
    chunk_sha256: str
    statement_sha256: str


class ChainLink(msgspec.Struct, frozen=True):
    """Where the chunk stands.  `predecessor` is an earlier chain, in the first chunk and all others alike."""

    id: str
    index: int
    previous: Previous | None
    manifest_sha256: str
    predecessor: Predecessor | None


class Events(msgspec.Struct, frozen=True):
    """The lines, as a whole."""

    count: int
    bytes: int
    merkle_root: str


class UncleanRun(msgspec.Struct, frozen=True):
    """A run of which nobody knows how many events were lost."""

    run: str
    reason: str


class StatedAccounting(msgspec.Struct, frozen=True):
    """The identity `produced == recorded + filtered + lost`, and the ledger that breaks it down."""

    produced: int
    recorded: int
    filtered: int
    lost: int
    filtered_by_cause: dict[str, int]
    lost_by_cause: dict[str, int]
    ledger_sha256: str
    unclean: list[UncleanRun]


class StatedMonitor(msgspec.Struct, frozen=True):
    """What watched, by the newest coverage document of the chunk."""

    collector_version: str
    signer_version: str
    config_sha256: str
    probes: list[Probe]
    bpf_object_sha256: str
    btf: Btf


class Host(msgspec.Struct, frozen=True):
    """Where it watched."""

    node: str
    kernel_release: str
    arch: str


class Predicate(msgspec.Struct, frozen=True):
    """The predicate of `PREDICATE_TYPE`."""

    chain: ChainLink
    events: Events
    window: Window
    accounting: StatedAccounting
    monitor: StatedMonitor
    host: Host
    close_reason: str


class Statement(msgspec.Struct, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}):
    """An in-toto Statement v1 with our predicate."""

    type: str
    subject: list[Subject]
    predicate_type: str
    predicate: Predicate


class Context(msgspec.Struct, frozen=True):
    """What a statement says beyond its ledger."""

    node: str
    manifest_sha256: str
    predecessor: Predecessor | None
    previous: Previous | None
    signer_version: str


def _plain(reason: str) -> str:
    """Return a reason of bounded size: printable ASCII, other characters as `?`."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in reason[:_REASON_MAX])


def build(ledger: Ledger, ledger_sha256: str, context: Context) -> Statement:
    """Return the statement of a chunk."""
    sums = accounting(ledger)
    monitor = coverage.read(ledger.coverage[-1].document if ledger.coverage else None)
    unclean = [UncleanRun(run.run, _plain(run.unclean)) for run in ledger.runs if run.unclean]
    return Statement(
        STATEMENT_TYPE,
        [Subject(names.chunk_file(ledger.index, names.DATA), {"sha256": ledger.sha256})],
        PREDICATE_TYPE,
        Predicate(
            ChainLink(ledger.chain_id, ledger.index, context.previous, context.manifest_sha256, context.predecessor),
            Events(ledger.lines, ledger.bytes, ledger.merkle_root),
            msgspec.structs.replace(ledger.window, boots=ledger.window.boots[-_BOOTS_MAX:]),
            StatedAccounting(
                sums.produced,
                sums.recorded,
                sums.filtered,
                sums.lost,
                ledger.filtered,
                ledger.lost,
                ledger_sha256,
                unclean[:_UNCLEAN_MAX],
            ),
            StatedMonitor(
                monitor.collector_version,
                context.signer_version,
                monitor.config_sha256,
                monitor.probes,
                monitor.bpf_object_sha256,
                monitor.btf,
            ),
            Host(context.node, monitor.kernel_release, monitor.arch),
            ledger.close_reason,
        ),
    )


def encode(statement: Statement) -> bytes:
    """Return the statement's RFC 8785 bytes: the DSSE payload.  Raises `BrokenPromise` when over 16 KiB."""
    data = canonical.dumps(statement)
    if len(data) > MAX_STATEMENT_BYTES:
        raise BrokenPromise(f"a statement of {len(data)} bytes is over {MAX_STATEMENT_BYTES}")
    return data


def decode(payload: bytes) -> Statement:
    """Parse a statement.  Raises `ValueError` unless it is canonical and of our two types."""
    if len(payload) > MAX_STATEMENT_BYTES:
        raise ValueError(f"a statement of {len(payload)} bytes is over {MAX_STATEMENT_BYTES}")
    statement = canonical.loads(payload, Statement)
    if statement.type != STATEMENT_TYPE or statement.predicate_type != PREDICATE_TYPE:
        raise ValueError(f"statement type {statement.type!r} with predicate {statement.predicate_type!r} is not ours")
    if len(statement.subject) != 1:
        raise ValueError(f"{len(statement.subject)} subjects, exactly one is expected")
    return statement
