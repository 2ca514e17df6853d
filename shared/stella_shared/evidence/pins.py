"""Pinned ends: a newer statement of a chain that somebody kept where the chain's holder cannot write.

head.json of the state directory    manifest.dsse.json of an export    `stella signals manifest`'s JSON
NNNNNN.dsse.json or NNNNNN.sigstore.json of a later chunk of the same chain
"""

from __future__ import annotations

import base64
import binascii
from hashlib import sha256
from typing import Any

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.evidence import canonical, dsse, manifest, statement
from stella_shared.evidence.dsse import Opened
from stella_shared.evidence.records import Head
from stella_shared.evidence.statement import Previous


class Pin(msgspec.Struct, frozen=True):
    """A statement that the chain must agree with, and go as far as.

    `head` is there when the pin is a head.json.  `previous` is what the pinned chunk says of the one before.
    `declared` is the last chunk of the export whose manifest this is, 0 otherwise.  `signed` is there for what
    carries a signature of its own; nobody has verified it yet.
    """

    chain_id: str
    index: int
    statement_sha256: str
    head: Head | None = None
    previous: Previous | None = None
    declared: int = 0
    signed: Opened | None = None


def read(data: bytes) -> Pin:
    """Parse a pinned end of any of the kinds above.  Raises `ValueError` for what is none."""
    plain = canonical.decode(data)
    if isinstance(plain, dict) and "payload" in plain:
        return _of_envelope(dsse.open_envelope(data, manifest.MAX_ENVELOPE_BYTES))
    if isinstance(plain, dict) and isinstance(plain.get("envelope"), dict):
        # What `stella signals manifest` prints is for people too; the envelope in it is canonical again.
        try:
            envelope = canonical.dumps(plain["envelope"])
        except BrokenPromise as e:
            raise ValueError(str(e)) from None
        return _of_envelope(dsse.open_envelope(envelope, manifest.MAX_ENVELOPE_BYTES))
    if isinstance(plain, dict) and isinstance(plain.get("dsseEnvelope"), dict):
        return _of_envelope(_of_bundle(plain["dsseEnvelope"]))
    head = canonical.loads(data, Head)
    return Pin(head.chain_id, head.index, head.statement_sha256, head)


def _of_bundle(envelope: dict[str, Any]) -> Opened:
    """Return the envelope in a Sigstore bundle: ProtoJSON, so of freer form than ours."""
    try:
        (signature,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        return Opened(payload, str(signature.get("keyid", "")), base64.b64decode(signature["sig"], validate=True))
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise ValueError("no Sigstore bundle of a signed statement") from None


def _of_envelope(opened: Opened) -> Pin:
    try:
        stated = statement.decode(opened.payload)
    except ValueError:
        listed = manifest.decode(opened.payload).predicate
        return Pin(
            listed.chain_id, listed.head.index, listed.head.statement_sha256, declared=listed.last, signed=opened
        )
    link = stated.predicate.chain
    digest = sha256(opened.payload).hexdigest()
    return Pin(link.id, link.index, digest, previous=link.previous, signed=opened)
