"""Log entries of a DSSE envelope: what each kind must say, and whether a log really holds one.

Rekor v1 keeps `dsse 0.0.1`, Rekor v2 `hashedrekord 0.0.2`; both are canonical JSON whose every byte follows
from the envelope and the verifier, so the expected body is made and compared.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from stella_shared.evidence import dsse
from stella_shared.evidence.canonical import base64_bytes
from stella_shared.evidence.merkle_paths import HASH_BYTES, PATH_MAX, root_from_path
from stella_shared.evidence.transparency import checkpoint as notes
from stella_shared.evidence.transparency import tree
from stella_shared.evidence.transparency.bundle import TlogEntry
from stella_shared.evidence.transparency.trust import Log, TrustRoot

V1: Final = ("dsse", "0.0.1")
V2: Final = ("hashedrekord", "0.0.2")
_P256: Final = "PKIX_ECDSA_P256_SHA_256"
_MAX_TIME: Final = 1 << 40


class Verifier(msgspec.Struct, frozen=True):
    """What a signature is checked with: the key, and the DER certificate it came in, b"" for a managed key."""

    key: Any  # ec.EllipticCurvePublicKey
    certificate: bytes = b""

    @property
    def spki(self) -> bytes:
        """The key's SubjectPublicKeyInfo in DER."""
        return bytes(self.key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))

    @property
    def pem(self) -> bytes:
        """The certificate, else the public key, in PEM: how Rekor v1 is told."""
        if self.certificate:
            return x509.load_der_x509_certificate(self.certificate).public_bytes(serialization.Encoding.PEM)
        return bytes(self.key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))

    def rekor_v2(self) -> dict[str, Any]:
        """Return the `verifier` of a hashedrekord 0.0.2."""
        which, raw = ("x509Certificate", self.certificate) if self.certificate else ("publicKey", self.spki)
        return {"keyDetails": _P256, which: {"rawBytes": base64.b64encode(raw).decode()}}


def body_v1(envelope: bytes, verifier: Verifier) -> bytes:
    """Return the canonical body of the `dsse 0.0.1` entry of an envelope's exact bytes."""
    opened = dsse.open_envelope(envelope)
    return rfc8785.dumps(
        {
            "apiVersion": V1[1],
            "kind": V1[0],
            "spec": {
                "envelopeHash": {"algorithm": "sha256", "value": sha256(envelope).hexdigest()},
                "payloadHash": {"algorithm": "sha256", "value": sha256(opened.payload).hexdigest()},
                "signatures": [
                    {
                        "signature": base64.b64encode(opened.signature).decode(),
                        "verifier": base64.b64encode(verifier.pem).decode(),
                    }
                ],
            },
        }
    )


def hashedrekord(envelope: bytes, verifier: Verifier) -> dict[str, Any]:
    """Return digest, signature and verifier of an envelope, as Rekor v2 is asked to log them."""
    opened = dsse.open_envelope(envelope)
    return {
        "digest": base64.b64encode(sha256(dsse.pae(dsse.PAYLOAD_TYPE, opened.payload)).digest()).decode(),
        "signature": {
            "content": base64.b64encode(opened.signature).decode(),
            "verifier": verifier.rekor_v2(),
        },
    }


def body_v2(envelope: bytes, verifier: Verifier) -> bytes:
    """Return the canonical body of the `hashedrekord 0.0.2` entry of an envelope."""
    asked = hashedrekord(envelope, verifier)
    spec = {"data": {"algorithm": "SHA2_256", "digest": asked["digest"]}, "signature": asked["signature"]}
    return rfc8785.dumps({"apiVersion": V2[1], "kind": V2[0], "spec": {"hashedRekordV002": spec}})


_BODIES: Final = {V1: body_v1, V2: body_v2}


class Logged(msgspec.Struct, frozen=True):
    """A log entry that holds.  `integrated` is the log's own signed time (Rekor v1), None without one."""

    log: str
    index: int
    size: int
    integrated: datetime | None


def check(entry: TlogEntry, envelope: bytes, verifier: Verifier, root: TrustRoot) -> Logged:
    """Make sure that `entry` is of this envelope and in a trusted log.  Raises `ValueError` that says what fails."""
    kind = (entry.kind_version.kind, entry.kind_version.version)
    if kind not in _BODIES:
        raise ValueError(f"an entry of kind {kind[0]} {kind[1]} is not known here")
    body = base64_bytes(entry.canonicalized_body)
    if body != _BODIES[kind](envelope, verifier):
        raise ValueError("the log entry is of another envelope or another key")
    log_id = base64_bytes(entry.log_id.key_id)
    log = root.log(log_id)
    proof = entry.inclusion_proof
    index, size, position = (_number(n) for n in (proof.log_index, proof.tree_size, entry.log_index))
    signed = notes.parse(proof.checkpoint.envelope)
    notes.check_signature(signed, log)
    path = [base64_bytes(item) for item in proof.hashes]
    if len(path) > PATH_MAX or any(len(item) != HASH_BYTES for item in path):
        raise ValueError("an inclusion proof with hashes of a wrong length, or with too many")
    computed = root_from_path(tree.leaf(body), index, size, path)
    if (signed.size, signed.root) != (size, computed) or base64_bytes(proof.root_hash) != computed:
        raise ValueError("the inclusion proof does not lead to the log's checkpoint")
    if kind == V2:
        if entry.integrated_time is not None or entry.inclusion_promise is not None or position != index:
            raise ValueError("an entry of this kind has no integrated time, and one index")
        return Logged(log.name, position, size, None)
    return Logged(log.name, position, size, _integrated(entry, log, log_id, position))


def _integrated(entry: TlogEntry, log: Log, log_id: bytes, position: int) -> datetime | None:
    """Return Rekor v1's time of the entry, when its promise is there and holds."""
    if entry.inclusion_promise is None or entry.integrated_time is None:
        return None
    seconds = _number(entry.integrated_time)
    if seconds > _MAX_TIME:
        raise ValueError(f"integrated time {seconds} cannot be")
    promised: dict[str, Any] = {
        "body": entry.canonicalized_body,
        "integratedTime": seconds,
        "logID": log_id.hex(),
        "logIndex": position,
    }
    signature, message = base64_bytes(entry.inclusion_promise.signed_entry_timestamp), rfc8785.dumps(promised)
    if not log.signed(signature, message):
        raise ValueError("the log's promise (signed entry timestamp) is not signed by it")
    at = datetime.fromtimestamp(seconds, UTC)
    if not log.validity.holds(at):
        raise ValueError(f"the log's key did not count at {at:%Y-%m-%dT%H:%M:%SZ}")
    return at


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 16 or (text != "0" and text.startswith("0")):
        raise ValueError(f"{text[:40]!r} is no index")
    return int(text)
