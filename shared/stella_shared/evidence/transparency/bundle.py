"""Sigstore bundles v0.3 of a DSSE envelope, canonical JSON: written for any conformant verifier, read back strictly.

protobuf-specs `sigstore_bundle.proto`, in its JSON form: bytes in base64, 64-bit integers as decimal text, and
empty lists written out, because readers ask for them.
"""

from __future__ import annotations

import base64
from typing import Final

import msgspec

from stella_shared.evidence import canonical
from stella_shared.evidence.dsse import Envelope

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
MAX_BYTES: Final = 1 << 20
MAX_ENTRIES: Final = 8
MAX_TIMESTAMPS: Final = 8


class _Strict(msgspec.Struct, frozen=True, rename="camel", forbid_unknown_fields=True, omit_defaults=True):
    """Base: camelCase, nothing unknown, what is not there is not written."""


class LogId(_Strict, frozen=True):
    """`keyId`: base64."""

    key_id: str


class KindVersion(_Strict, frozen=True):
    """The type of a log entry."""

    kind: str
    version: str


class InclusionPromise(_Strict, frozen=True):
    """Rekor v1's signed entry timestamp."""

    signed_entry_timestamp: str


class CheckpointText(_Strict, frozen=True):
    """A signed note, as the log gave it."""

    envelope: str


class InclusionProof(_Strict, frozen=True):
    """Where an entry stands in the tree of the checkpoint."""

    log_index: str
    root_hash: str
    tree_size: str
    hashes: list[str]
    checkpoint: CheckpointText


class TlogEntry(_Strict, frozen=True):
    """A transparency log entry.  `integrated_time` is Rekor v1's."""

    log_index: str
    log_id: LogId
    kind_version: KindVersion
    inclusion_proof: InclusionProof
    canonicalized_body: str
    integrated_time: str | None = None
    inclusion_promise: InclusionPromise | None = None


class PublicKeyHint(_Strict, frozen=True):
    """Which key: base64 of the SHA-256 of its SPKI.  A hint, not authenticated."""

    hint: str


class CertificateBytes(_Strict, frozen=True):
    """A leaf certificate in DER, base64."""

    raw_bytes: str


class SignedTimestamp(_Strict, frozen=True):
    """An RFC 3161 TimeStampResp in DER, base64."""

    signed_timestamp: str


class Timestamps(_Strict, frozen=True):
    """RFC 3161 timestamps over the signature."""

    rfc3161_timestamps: list[SignedTimestamp]


class Material(_Strict, frozen=True):
    """What the signature is checked with.  Exactly one of `public_key` and `certificate` is there."""

    tlog_entries: list[TlogEntry]
    public_key: PublicKeyHint | None = None
    certificate: CertificateBytes | None = None
    timestamp_verification_data: Timestamps | None = None


class Bundle(_Strict, frozen=True):
    """The JSON of `NNNNNN.sigstore.json`."""

    media_type: str
    verification_material: Material
    dsse_envelope: Envelope

    @property
    def timestamps(self) -> list[bytes]:
        """The RFC 3161 responses."""
        data = self.verification_material.timestamp_verification_data
        return [canonical.base64_bytes(item.signed_timestamp) for item in data.rfc3161_timestamps] if data else []


def assemble(
    envelope: bytes, *, hint: str = "", certificate: bytes = b"", entries: list[TlogEntry], timestamps: list[bytes]
) -> Bundle:
    """Return the bundle of an envelope's bytes; `hint` for a key, `certificate` (DER) for a keyless signature."""
    stamped = [SignedTimestamp(base64.b64encode(item).decode()) for item in timestamps]
    return Bundle(
        MEDIA_TYPE,
        Material(
            entries,
            None if certificate else PublicKeyHint(hint),
            CertificateBytes(base64.b64encode(certificate).decode()) if certificate else None,
            Timestamps(stamped) if stamped else None,
        ),
        canonical.loads(envelope, Envelope),
    )


def encode(bundle: Bundle) -> bytes:
    """Return the bundle's canonical bytes."""
    return canonical.dumps(bundle)


def decode(data: bytes) -> Bundle:
    """Parse a bundle.  Raises `ValueError` unless it is exactly of the form that `encode` writes."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"a bundle of {len(data)} bytes is over {MAX_BYTES}")
    bundle = canonical.loads(data, Bundle)
    material = bundle.verification_material
    if bundle.media_type != MEDIA_TYPE:
        raise ValueError(f"media type {bundle.media_type!r} is not {MEDIA_TYPE!r}")
    if (material.public_key is None) == (material.certificate is None):
        raise ValueError("a bundle holds either a key's hint or a certificate")
    stamps = material.timestamp_verification_data
    if len(material.tlog_entries) > MAX_ENTRIES or (stamps and len(stamps.rfc3161_timestamps) > MAX_TIMESTAMPS):
        raise ValueError("more log entries or timestamps than anybody needs")
    if stamps and len(set(stamps.rfc3161_timestamps)) != len(stamps.rfc3161_timestamps):
        raise ValueError("the same timestamp twice")
    return bundle
