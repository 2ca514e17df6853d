"""A whole bundle, checked: this envelope, by this key or identity, in these logs, seen at these times."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import canonical, dsse, keys
from stella_shared.evidence.transparency import bundle as bundles
from stella_shared.evidence.transparency import certificate as certificates
from stella_shared.evidence.transparency import entry as entries
from stella_shared.evidence.transparency import timestamp as timestamps
from stella_shared.evidence.transparency.bundle import Bundle
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.entry import Logged, Verifier
from stella_shared.evidence.transparency.trust import TrustRoot

_SOURCE_LOG: Final = "log"
_SOURCE_TSA: Final = "timestamp authority"


class TrustedTime(msgspec.Struct, frozen=True):
    """When somebody trusted saw the signature, and who: a log, or a timestamp authority."""

    at: datetime
    source: str


class Proof(msgspec.Struct, frozen=True):
    """What a bundle proves beyond the signature.  `identity` is None for a managed key."""

    logged: list[Logged]
    times: list[TrustedTime]
    identity: Identity | None
    #: Timestamps that no trusted authority vouches for, in words.
    unknown_times: list[str]


def verifier_of(key: ec.EllipticCurvePublicKey | None, certificate: x509.Certificate | None) -> Verifier:
    """Return what a signature is checked with: a managed key, or a certificate's."""
    if certificate is not None:
        from cryptography.hazmat.primitives.serialization import Encoding

        return Verifier(certificates.key_of(certificate), certificate.public_bytes(Encoding.DER))
    return Verifier(key)


def check_form(data: bytes, envelope: bytes, verifier: Verifier) -> Bundle:
    """Return the bundle in `data` after making sure that it is one of `envelope` and `verifier`.

    Nothing of its log entries and timestamps is checked.  Raises `ValueError` that says what does not fit.
    """
    bundle = bundles.decode(data)
    material = bundle.verification_material
    if dsse.encode(bundle.dsse_envelope) != envelope:
        raise ValueError("the bundle holds another envelope than the one that is here")
    if material.public_key is not None and (
        verifier.certificate or material.public_key.hint != keys.key_hint(keys.key_id(verifier.key))
    ):
        raise ValueError("the bundle names another key")
    held = material.certificate
    if held is not None and canonical.base64_bytes(held.raw_bytes) != verifier.certificate:
        raise ValueError("the bundle holds another certificate")
    return bundle


def check(data: bytes, envelope: bytes, verifier: Verifier, root: TrustRoot) -> Proof:
    """Make sure that the bundle in `data` is of `envelope` and holds.  Raises `ValueError` that says what fails.

    The envelope's bytes are those of `NNNNNN.dsse.json`.  Whether key or identity are trusted is for the caller.
    """
    bundle = check_form(data, envelope, verifier)
    material = bundle.verification_material
    signature = signature_of(envelope, verifier)
    if not material.tlog_entries:
        raise ValueError("the bundle has no log entry")
    logged = [entries.check(entry, envelope, verifier, root) for entry in material.tlog_entries]
    times = [TrustedTime(entry.integrated, _SOURCE_LOG) for entry in logged if entry.integrated]
    stamped, unknown = check_times(bundle.timestamps, signature, root)
    times += stamped
    for entry, raw in zip(logged, material.tlog_entries, strict=True):
        log = root.log(canonical.base64_bytes(raw.log_id.key_id))
        if entry.integrated is None and times and not any(log.validity.holds(time.at) for time in times):
            raise ValueError(f"the key of log {log.name} did not count at that time")
    who = None
    if verifier.certificate:
        certificate = x509.load_der_x509_certificate(verifier.certificate)
        certificates.check(certificate, [time.at for time in times], root)
        who = certificates.identity(certificate)
        certificates.check_with_sigstore(data, who, root)
    return Proof(logged, times, who, unknown)


def signature_of(envelope: bytes, verifier: Verifier) -> bytes:
    """Return the envelope's signature after checking it.  Raises `ValueError`."""
    opened = dsse.open_envelope(envelope)
    if not keys.signature_holds(verifier.key, dsse.pae(dsse.PAYLOAD_TYPE, opened.payload), opened.signature):
        raise ValueError("the signature does not fit the statement")
    return opened.signature


def check_times(responses: list[bytes], signature: bytes, root: TrustRoot) -> tuple[list[TrustedTime], list[str]]:
    """Return the times that trusted authorities vouch for, and in words what is wrong with the others.

    Raises `ValueError` for a timestamp of another signature: that one was put there by somebody.
    """
    times: list[TrustedTime] = []
    unknown: list[str] = []
    for response in responses:
        parsed: Any = timestamps.parse(response)
        if not timestamps.is_of(parsed, signature):
            raise ValueError("a timestamp is of another signature")
        try:
            times.append(TrustedTime(timestamps.check(response, signature, root), _SOURCE_TSA))
        except ValueError as e:
            unknown.append(str(e))
    return times, unknown
