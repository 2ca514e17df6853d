"""Statement, ledger and bytes of one chunk held against each other, and against the chunk before.  Pure."""

from __future__ import annotations

import msgspec

from stella_shared.evidence import names, records, statement
from stella_shared.evidence.lines import Digest
from stella_shared.evidence.records import Chain, Ledger
from stella_shared.evidence.report import Fault
from stella_shared.evidence.statement import Statement
from stella_shared.evidence.vouching import form_code


class Known(msgspec.Struct, frozen=True):
    """What is remembered of the chunk before."""

    index: int
    ledger: Ledger | None = None
    ledger_sha256: str = ""
    chunk_sha256: str = ""
    statement_sha256: str = ""


class Surroundings(msgspec.Struct, frozen=True):
    """What a chunk stands in: its chain, the digest of chain.json, and the chunk before, None where it is unknown."""

    chain: Chain | None
    manifest_sha256: str
    before: Known | None


class Read(msgspec.Struct, frozen=True):
    """A chunk as it was read.  `form` is what is wrong with the ledger's form; `digest` is None without the lines."""

    index: int
    stated: Statement | None
    ledger: Ledger | None
    ledger_sha256: str
    form: str
    digest: Digest | None


def faults(chunk: Read, around: Surroundings) -> list[Fault]:
    """Return each way in which a chunk's parts do not fit together, and do not follow the chunk before."""
    found: list[Fault] = []

    def fault(code: str, message: str) -> None:
        found.append(Fault(code, chunk.index, message))

    index, stated, ledger, digest = chunk.index, chunk.stated, chunk.ledger, chunk.digest
    data_name = names.chunk_file(index, names.DATA)
    ledger_name = names.chunk_file(index, names.LEDGER)
    said = stated.subject[0].digest.get("sha256", "") if stated else ledger.sha256 if ledger else ""
    signed_ledger = stated.predicate.accounting.ledger_sha256 if stated else ""
    ledger_fits = not stated or not chunk.ledger_sha256 or chunk.ledger_sha256 == signed_ledger
    data_fits = digest is None or not said or digest.sha256 == said
    if not ledger_fits and not data_fits and ledger and digest and ledger.sha256 == digest.sha256:
        fault("bundle_mismatch", "the statement describes another chunk than the one that is here")
        return found
    if not ledger_fits:
        fault("edited", f"{ledger_name} is not what was signed")
    elif chunk.form:
        fault(form_code(chunk.form), f"{ledger_name}: {chunk.form}")
    if not data_fits:
        fault("edited", f"{data_name} is not what was signed")
    if ledger is None or not ledger_fits:
        return found
    chain, before = around.chain, around.before
    if chain and (ledger.chain_id != chain.chain_id or ledger.format != records.FORMAT):
        fault("spliced", f"{ledger_name} is of chain {ledger.chain_id}")
    if ledger.index != index:
        fault("reordered", f"{ledger_name} says that it is chunk {ledger.index}")
    if digest and data_fits and digest.damage:
        fault("malformed", f"{data_name}: {digest.damage}")
    elif digest and data_fits and _shape(digest) != (ledger.bytes, ledger.lines, ledger.merkle_root, ledger.sha256):
        fault("bundle_mismatch", f"{ledger_name} does not describe {data_name}")
    elif digest and data_fits and not digest.complete:
        fault("malformed", f"{data_name} does not end with a newline")
    if stated and stated != statement.build(ledger, chunk.ledger_sha256, _context(stated)):
        fault("bundle_mismatch", "statement and ledger do not describe the same thing")
    if before and before.ledger_sha256 and ledger.previous_ledger_sha256 != before.ledger_sha256:
        fault("forked", "its ledger continues another ledger than the one before it")
    if index == names.FIRST_INDEX and ledger.previous_ledger_sha256:
        fault("forked", "the first ledger names one before it")
    return found


def link_faults(index: int, stated: Statement, around: Surroundings) -> list[Fault]:
    """Return each way in which a statement does not stand where it says."""
    found: list[Fault] = []

    def fault(code: str, message: str) -> None:
        found.append(Fault(code, index, message))

    link, chain, before = stated.predicate.chain, around.chain, around.before
    if chain and (link.id != chain.chain_id or stated.predicate.host.node != chain.node):
        fault("spliced", f"its statement is of chain {link.id}, node {stated.predicate.host.node}")
        return found
    if link.index != index:
        fault("reordered", f"its statement says that it is chunk {link.index}")
        return found
    if stated.subject[0].name != names.chunk_file(index, names.DATA):
        fault("bundle_mismatch", f"its statement is about {stated.subject[0].name}")
    if chain and (link.manifest_sha256 != around.manifest_sha256 or link.predecessor != chain.predecessor):
        fault("edited", f"{names.CHAIN} is not the one that was signed")
    if (link.previous is None) != (index == names.FIRST_INDEX):
        fault("forked", "only the first chunk has none before it")
    if link.previous is None or before is None or not before.statement_sha256:
        return found
    here = (before.index, before.chunk_sha256, before.statement_sha256)
    if (link.previous.index, link.previous.chunk_sha256, link.previous.statement_sha256) != here:
        fault("forked", f"it follows another chunk {link.previous.index} than the one that is here")
    return found


def _shape(digest: Digest) -> tuple[int, int, str, str]:
    return digest.bytes, digest.lines, digest.merkle_root, digest.sha256


def _context(stated: Statement) -> statement.Context:
    """Return what of a statement is checked elsewhere (links), or cannot be (the signer's version)."""
    predicate = stated.predicate
    return statement.Context(
        predicate.host.node,
        predicate.chain.manifest_sha256,
        predicate.chain.predecessor,
        predicate.chain.previous,
        predicate.monitor.signer_version,
    )
