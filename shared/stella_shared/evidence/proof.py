"""Proofs that one evidence line is in a signed chunk; the other lines stay unseen.

    line ──leaf hash──▶ path ──▶ Merkle root ── in ──▶ statement ── in ──▶ envelope ──signature──▶ key

A proof carries everything but trust: which keys count is told by whoever checks it.  Nothing here reads files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import canonical, dsse, keys, merkle, merkle_paths, statement
from stella_shared.evidence.lines import MAX_LINE_BYTES
from stella_shared.evidence.statement import Statement

FORMAT: Final = "stella-signals-proof/1"
#: A line of 8 MiB may grow sixfold as a JSON string; the rest stays far below one MiB.
MAX_PROOF_BYTES: Final = 64 << 20
MAX_BUNDLE_BYTES: Final = 256 << 10

_HASH = re.compile(r"[0-9a-f]{64}")


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of a proof.  `line` is without its newline, `leaf_index` counts from 0, `path` holds hex hashes.

    `envelope` and `bundle` are the exact texts of `NNNNNN.dsse.json` and `NNNNNN.sigstore.json`.
    """

    format: str
    chain_id: str
    chunk: int
    line: str
    leaf_index: int
    tree_size: int
    path: list[str]
    envelope: str
    public_key: str
    bundle: str | None


class Proven(msgspec.Struct, frozen=True):
    """What a proof proves.  `line_number` counts from 1; `log` is empty when the chunk's statement is in none."""

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
    log: str


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
    if proof.bundle is not None and len(proof.bundle.encode()) > MAX_BUNDLE_BYTES:
        raise ValueError(f"the bundle is longer than {MAX_BUNDLE_BYTES} bytes")
    return proof


def verify(data: bytes, trusted: Mapping[str, str]) -> Proven:
    """Return what the proof in `data` proves.

    `trusted` maps the key ids that count to the time after which they count no more ("" for none); the key in
    the proof is used only when its id is among them.  Raises `ValueError`, saying what does not hold.
    """
    proof = decode(data)
    envelope = proof.envelope.encode()
    opened = dsse.open_envelope(envelope)
    stated = statement.decode(opened.payload)
    predicate = stated.predicate
    if not trusted:
        raise ValueError(f"no trusted key is known; the proof names sha256:{opened.key_id[:64]}")
    if opened.key_id not in trusted:
        raise ValueError(f"signed with key sha256:{opened.key_id[:64]}, which is not trusted")
    not_after = trusted[opened.key_id]
    if not_after and predicate.window.end > not_after:
        raise ValueError(f"signed after its key was retired ({not_after})")
    key = keys.load_public(proof.public_key.encode())
    if keys.key_id(key) != opened.key_id:
        raise ValueError("the public key is another one than the key that the envelope names")
    log = _vouch(envelope, proof.bundle.encode() if proof.bundle is not None else None, key)
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
    return Proven(
        proof.chain_id,
        predicate.host.node,
        proof.chunk,
        proof.leaf_index + 1,
        proof.tree_size,
        proof.line,
        predicate.window.start,
        predicate.window.end,
        opened.key_id,
        stated.subject[0].digest.get("sha256", ""),
        sha256(opened.payload).hexdigest(),
        log,
    )


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


def _vouch(envelope: bytes, bundle: bytes | None, key: ec.EllipticCurvePublicKey) -> str:
    """Make sure that `key` signed the envelope; return which log tells of it, "" for none.

    Raises `ValueError` when the signature does not fit, and for a bundle: what nobody checked must not look
    as if it had been.
    """
    opened = dsse.open_envelope(envelope)
    if not keys.signature_holds(key, dsse.pae(dsse.PAYLOAD_TYPE, opened.payload), opened.signature):
        raise ValueError("the signature does not fit the statement")
    if bundle is not None:
        raise ValueError("it comes with the bundle of a log, which this release cannot check")
    return ""
