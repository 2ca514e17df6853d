"""DSSE envelopes (github.com/secure-systems-lab/dsse, v1), one signature each, canonical bytes."""

from __future__ import annotations

import base64

import msgspec

from stella_shared.evidence import canonical

PAYLOAD_TYPE = "application/vnd.in-toto+json"
#: A statement stays under 16 KiB; an envelope is that in base64, and a little around it.
MAX_ENVELOPE_BYTES = 64 << 10


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`keyid` is the hex SHA-256 of the key's SPKI DER; `sig` the base64 of the DER ECDSA signature."""

    keyid: str
    sig: str


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """The JSON of `NNNNNN.dsse.json`."""

    payload: str
    payload_type: str
    signatures: list[Signature]


class Opened(msgspec.Struct, frozen=True):
    """A parsed envelope.  Nothing is verified yet."""

    payload: bytes
    key_id: str
    signature: bytes


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, key_id: str, signature: bytes) -> bytes:
    """Return the canonical bytes of an envelope with one signature."""
    return encode(
        Envelope(
            base64.b64encode(payload).decode(),
            PAYLOAD_TYPE,
            [Signature(key_id, base64.b64encode(signature).decode())],
        )
    )


def encode(envelope: Envelope) -> bytes:
    """Return the canonical bytes of an envelope."""
    return canonical.dumps(envelope)


def open_envelope(data: bytes, limit: int = MAX_ENVELOPE_BYTES) -> Opened:
    """Parse an envelope.  Raises `ValueError` unless it is exactly of the form that `seal` makes."""
    if len(data) > limit:
        raise ValueError(f"an envelope of {len(data)} bytes is over {limit}")
    envelope = canonical.loads(data, Envelope)
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ValueError(f"payload type {envelope.payload_type!r} is not {PAYLOAD_TYPE!r}")
    if len(envelope.signatures) != 1:
        raise ValueError(f"{len(envelope.signatures)} signatures, exactly one is expected")
    only = envelope.signatures[0]
    return Opened(canonical.base64_bytes(envelope.payload), only.keyid, canonical.base64_bytes(only.sig))
