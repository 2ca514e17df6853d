"""Proofs that one evidence line is in a signed chunk; the other lines stay unseen.

    line ──leaf hash──▶ path ──▶ Merkle root ── in ──▶ statement ── in ──▶ envelope ──signature──▶ key

A proof carries everything but trust: which keys count is told by whoever checks it.  Nothing here reads files.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import canonical, dsse, keys, merkle, merkle_paths, statement
from stella_shared.evidence.lines import MAX_LINE_BYTES
from stella_shared.evidence.statement import Statement
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.vouching import Files, Trust, Vouched, earliest, vouch

FORMAT: Final = "stella-signals-proof/1"
#: A line of 8 MiB may grow sixfold as a JSON string; the rest is bounded by its own readers.
MAX_PROOF_BYTES: Final = 64 << 20

_HASH = re.compile(r"[0-9a-f]{64}")


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of a proof.  `line` is without its newline, `leaf_index` counts from 0, `path` holds hex hashes.

    `envelope`, `certificate`, `stamps` and `bundle` are the exact texts of `NNNNNN.dsse.json`, `.cert.pem`,
    `.stamps.json` and `.sigstore.json`, null for a file that is not there.  `public_key` is the PEM text of a
    managed key, null for a keyless signature.
    """

    format: str
    chain_id: str
    chunk: int
    line: str
    leaf_index: int
    tree_size: int
    path: list[str]
    envelope: str
    public_key: str | None
    certificate: str | None
    stamps: str | None
    bundle: str | None


class Proven(msgspec.Struct, frozen=True):
    """What a proof proves.  `line_number` counts from 1; `log` is empty when the chunk's statement is in none.

    `trusted_time` is when somebody trusted first saw the signature, "" when nobody did.  `unjudged` is true when
    there is a log entry or timestamp, and no trusted root to judge it by.
    """

    chain_id: str
    node: str
    chunk: int
    line_number: int
    lines: int
    line: str
    start: str
    end: str
    key_id: str
    chunk_sha256: str
    statement_sha256: str
    identity: Identity | None
    log: str
    log_index: int | None
    trusted_time: str
    unjudged: bool


def encode(proof: Proof) -> bytes:
    """Return the bytes of a proof file: canonical JSON, no newline at the end."""
    return canonical.dumps(proof)


def decode(data: bytes) -> Proof:
    """Parse a proof.  Raises `ValueError` unless it is canonical, of our format and of bounded size."""
    if len(data) > MAX_PROOF_BYTES:
        raise ValueError(f"longer than {MAX_PROOF_BYTES} bytes")
    proof = canonical.loads(data, Proof)
    if proof.format != FORMAT:
        raise ValueError(f"format {proof.format[:40]!r} is not {FORMAT!r}")
    if len(proof.path) > merkle_paths.PATH_MAX or not all(_HASH.fullmatch(one) for one in proof.path):
        raise ValueError(f"the path is not a list of at most {merkle_paths.PATH_MAX} SHA-256 hashes in hex")
    return proof


def verify(data: bytes, trust: Trust) -> Proven:
    """Return what the proof in `data` proves to somebody who believes `trust`.

    Key and certificate in the proof are candidates only: they count when `trust` says so.  Raises `ValueError`,
    saying what does not hold.
    """
    proof = decode(data)
    envelope = proof.envelope.encode()
    stated = statement.decode(dsse.open_envelope(envelope).payload)
    predicate = stated.predicate
    vouched = _vouch(proof, envelope, trust, predicate.window.end)
    if (proof.chain_id, proof.chunk) != (predicate.chain.id, predicate.chain.index):
        raise ValueError(f"the statement is of chunk {predicate.chain.index} of chain {predicate.chain.id}")
    line = proof.line.encode()
    _check_line(line, stated)
    if proof.tree_size != predicate.events.count:
        raise ValueError(f"the chunk has {predicate.events.count} lines, the proof says {proof.tree_size}")
    [leaf] = merkle.leaves([line])
    path = [bytes.fromhex(one) for one in proof.path]
    if merkle_paths.root_from_path(leaf, proof.leaf_index, proof.tree_size, path).hex() != predicate.events.merkle_root:
        raise ValueError("the line is not at that place of the signed chunk: the path leads to another Merkle root")
    logged = vouched.logged[0] if vouched.logged else None
    return Proven(
        proof.chain_id,
        predicate.host.node,
        proof.chunk,
        proof.leaf_index + 1,
        proof.tree_size,
        proof.line,
        predicate.window.start,
        predicate.window.end,
        vouched.key_id,
        stated.subject[0].digest.get("sha256", ""),
        sha256(vouched.payload or b"").hexdigest(),
        vouched.identity,
        logged.log if logged else "",
        logged.index if logged else None,
        earliest(vouched.times),
        vouched.unjudged,
    )


def _vouch(proof: Proof, envelope: bytes, trust: Trust, signed_at: str) -> Vouched:
    """Return who vouches for the statement.  Raises `ValueError` when nobody does who is trusted."""
    candidates: dict[str, ec.EllipticCurvePublicKey] = {}
    if proof.public_key is not None:
        key = keys.load_public(proof.public_key.encode())
        candidates[keys.key_id(key)] = key
    if (proof.public_key is None) == (proof.certificate is None):
        raise ValueError("a proof holds either a public key or a certificate")

    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    files = Files(text(proof.certificate), text(proof.stamps), text(proof.bundle))
    vouched = vouch(envelope, files, candidates, trust, signed_at)
    if vouched.objections:
        raise ValueError(vouched.objections[0].message)
    if not vouched.trusted:
        raise ValueError(f"no trusted key is known; the proof names sha256:{vouched.key_id[:64]}")
    return vouched


def _check_line(line: bytes, stated: Statement) -> None:
    """Refuse what no honest chunk holds as a line."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        event: Any = msgspec.json.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(f"the line is no JSON: {e}") from None
    if not isinstance(event, dict) or not canonical.line_is_canonical(line, event):
        raise ValueError("the line is no canonical JSON object")
    if event.get("node") != stated.predicate.host.node:
        raise ValueError(f"the line is of another node than the chunk, which is of {stated.predicate.host.node}")
