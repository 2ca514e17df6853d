"""Whom to believe: logs, timestamp authorities and certificate authorities, out of a Sigstore TrustedRoot.

The document (protobuf-specs `TrustedRoot`, JSON) comes from whoever verifies: a pinned file, never from the
evidence.  Members that are not needed here are passed over, as the specification asks.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from stella_shared.evidence.canonical import base64_bytes

MAX_BYTES: Final = 4 << 20
_MEDIA_TYPES: Final = (
    "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
    "application/vnd.dev.sigstore.trustedroot.v0.2+json",
)
LogKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


class _Range(msgspec.Struct, frozen=True):
    start: datetime | None = None
    end: datetime | None = None


class _PublicKey(msgspec.Struct, frozen=True, rename="camel"):
    raw_bytes: str
    valid_for: _Range = _Range()


class _LogId(msgspec.Struct, frozen=True, rename="camel"):
    key_id: str


class _Tlog(msgspec.Struct, frozen=True, rename="camel"):
    base_url: str
    public_key: _PublicKey
    log_id: _LogId | None = None
    checkpoint_key_id: _LogId | None = None


class _Certificate(msgspec.Struct, frozen=True, rename="camel"):
    raw_bytes: str


class _Certificates(msgspec.Struct, frozen=True):
    certificates: list[_Certificate]


class _Authority(msgspec.Struct, frozen=True, rename="camel"):
    cert_chain: _Certificates
    uri: str = ""
    valid_for: _Range = _Range()


class _Root(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    tlogs: list[_Tlog] = []
    certificate_authorities: list[_Authority] = []
    timestamp_authorities: list[_Authority] = []


class Validity(msgspec.Struct, frozen=True):
    """A span of time, both ends included; None is open."""

    start: datetime | None
    end: datetime | None

    def holds(self, at: datetime) -> bool:
        """Return whether `at` lies inside."""
        return (self.start is None or self.start <= at) and (self.end is None or at <= self.end)


class Log(msgspec.Struct, frozen=True):
    """A log.  `name` is its base URL without the scheme: the name of its key in checkpoints.

    `ids` are the ids under which entries may name it; `key_hints` the first four bytes of its key's ids.
    """

    base_url: str
    name: str
    key: Any  # LogKey; msgspec cannot check foreign types
    ids: frozenset[bytes]
    validity: Validity

    @property
    def key_hints(self) -> frozenset[bytes]:
        """The four bytes by which checkpoint signatures name the key."""
        return frozenset(identity[:4] for identity in self.ids)

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is the log's over `message`: ECDSA over SHA-256, or Ed25519."""
        try:
            if isinstance(self.key, ec.EllipticCurvePublicKey):
                self.key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
            else:
                self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Authority(msgspec.Struct, frozen=True):
    """A timestamp or certificate authority: its certificates, leaf first, root last."""

    certificates: list[Any]  # x509.Certificate
    validity: Validity
    uri: str = ""


class TrustRoot(msgspec.Struct, frozen=True):
    """A parsed TrustedRoot.  `sha256` is the digest of the document, to pin it by."""

    document: bytes
    sha256: str
    logs: list[Log]
    timestamp_authorities: list[Authority]
    certificate_authorities: list[Authority]

    def log(self, identity: bytes) -> Log:
        """Return the log of that id.  Raises `ValueError` when it is not trusted."""
        for log in self.logs:
            if identity in log.ids:
                return log
        raise ValueError(f"log {base64.b64encode(identity).decode()} is not in the trusted root")


def parse(document: bytes) -> TrustRoot:
    """Return the trusted root in `document`.  Raises `ValueError` for what is not of the form."""
    if len(document) > MAX_BYTES:
        raise ValueError(f"a trusted root of {len(document)} bytes is over {MAX_BYTES}")
    try:
        root = msgspec.json.decode(document, type=_Root)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(f"no trusted root: {e}") from None
    if root.media_type not in _MEDIA_TYPES:
        raise ValueError(f"no trusted root: media type {root.media_type!r}")
    return TrustRoot(
        document,
        sha256(document).hexdigest(),
        [_log(item) for item in root.tlogs],
        [_authority(item) for item in root.timestamp_authorities],
        [_authority(item) for item in root.certificate_authorities],
    )


def log_ids(name: str, key: LogKey) -> frozenset[bytes]:
    """Return the ids of a log's key: SHA-256 of its SPKI (RFC 6962), and for Ed25519 that of C2SP signed-note."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ids = {sha256(spki).digest()}
    if isinstance(key, ed25519.Ed25519PublicKey):
        ids.add(sha256(name.encode() + b"\n\x01" + key.public_bytes_raw()).digest())
    return frozenset(ids)


def _log(item: _Tlog) -> Log:
    name = item.base_url.partition("://")[2].rstrip("/") or item.base_url
    try:
        key = serialization.load_der_public_key(base64_bytes(item.public_key.raw_bytes))
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ValueError(f"log {item.base_url}: no public key: {e}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise ValueError(f"log {item.base_url}: its key is neither ECDSA nor Ed25519")
    said = {base64_bytes(entry.key_id) for entry in (item.log_id, item.checkpoint_key_id) if entry}
    return Log(item.base_url, name, key, log_ids(name, key) | said, _validity(item.public_key.valid_for))


def _authority(item: _Authority) -> Authority:
    try:
        chain = [x509.load_der_x509_certificate(base64_bytes(c.raw_bytes)) for c in item.cert_chain.certificates]
    except (ValueError, x509.InvalidVersion) as e:
        raise ValueError(f"authority {item.uri or '?'}: {e}") from None
    if not chain:
        raise ValueError(f"authority {item.uri or '?'} has no certificate")
    return Authority(chain, _validity(item.valid_for), item.uri)


def _validity(span: _Range) -> Validity:
    def utc(at: datetime | None) -> datetime | None:
        return at.replace(tzinfo=UTC) if at is not None and at.tzinfo is None else at

    return Validity(utc(span.start), utc(span.end))
