"""Who vouches for a statement: key or identity, timestamps, log entry.  Bytes in, a verdict out; no files.

A chunk's envelope goes through here on every way: `verify-chain`, a proof of one line, a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import dsse, keys
from stella_shared.evidence.stamps import decode_stamps
from stella_shared.evidence.transparency import certificate as certificates
from stella_shared.evidence.transparency import proof_of_log
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.entry import Logged, Verifier
from stella_shared.evidence.transparency.proof_of_log import TrustedTime
from stella_shared.evidence.transparency.trust import TrustRoot

#: Faults after which the chunk may still be what it says: it is the trust that is missing.
UNTRUSTED: Final = ("unknown_key", "untrusted_time")


class Trust(msgspec.Struct, frozen=True):
    """Whom the verifier believes.  `keys`: id → the time after which it counts no more, "" for none.

    `root` says whose logs and authorities count; without it log entries and certificates cannot be judged.
    """

    keys: Mapping[str, str] = {}
    identities: frozenset[Identity] = frozenset()
    root: TrustRoot | None = None

    @property
    def anybody(self) -> bool:
        """Whether anybody is trusted at all."""
        return bool(self.keys or self.identities)


class Objection(msgspec.Struct, frozen=True):
    """A fault, by its code (`report.FAULT_CODES`)."""

    code: str
    message: str
    hint: str = ""


class Vouched(msgspec.Struct):
    """The verdict on an envelope.  `payload` is None when the envelope is malformed."""

    payload: bytes | None = None
    key_id: str = ""
    identity: Identity | None = None
    trusted: bool = False
    logged: list[Logged] = []
    times: list[TrustedTime] = []
    objections: list[Objection] = []
    #: There is a log entry or a timestamp, and no trusted root to judge it by.
    unjudged: bool = False
    #: Timestamps by nobody who is trusted, in words.
    unknown_times: list[str] = []

    def object_to(self, code: str, message: str, hint: str = "") -> None:
        """Add a fault."""
        self.objections.append(Objection(code, message, hint))


class Files(msgspec.Struct, frozen=True):
    """What lies beside an envelope; None for what is not there."""

    certificate: bytes | None = None
    stamps: bytes | None = None
    bundle: bytes | None = None


def vouch(
    envelope: bytes,
    files: Files,
    public_keys: Mapping[str, ec.EllipticCurvePublicKey],
    trust: Trust,
    signed_at: str = "",
) -> Vouched:
    """Return who vouches for `envelope`.

    `public_keys` are candidates by id, wherever they came from: they count when `trust` says so.  `signed_at`
    (RFC 3339) is compared with the time at which a key was retired.
    """
    verdict = Vouched()
    try:
        opened = dsse.open_envelope(envelope)
    except ValueError as e:
        verdict.object_to(form_code(e), f"envelope: {e}")
        return verdict
    verdict.payload, verdict.key_id = opened.payload, opened.key_id
    try:
        verifier = _verifier(opened.key_id, files, public_keys)
    except ValueError as e:
        verdict.object_to("bundle_mismatch", str(e))
        return verdict
    if files.certificate is None:
        _judge_key(verdict, trust, signed_at)
    if verifier is None:
        verdict.object_to("missing", f"the public key {opened.key_id[:64]} is not here")
        return verdict
    if not keys.signature_holds(verifier.key, dsse.pae(dsse.PAYLOAD_TYPE, opened.payload), opened.signature):
        verdict.object_to("bad_signature", "the signature does not fit the statement")
        return verdict
    _judge_log(verdict, envelope, files, verifier, trust)
    if files.certificate is not None:
        _judge_identity(verdict, files.certificate, trust)
    return verdict


def form_code(reason: object) -> str:
    """Return the code of a form fault: the right value in the wrong text, or no such value at all."""
    return "not_canonical" if str(reason).startswith("not canonical") else "malformed"


def _verifier(key_id: str, files: Files, public_keys: Mapping[str, ec.EllipticCurvePublicKey]) -> Verifier | None:
    if files.certificate is None:
        key = public_keys.get(key_id)
        return Verifier(key) if key else None
    verifier = proof_of_log.verifier_of(None, certificates.load(files.certificate))
    if keys.key_id(verifier.key) != key_id:
        raise ValueError("the certificate is of another key than the signature")
    return verifier


def _judge_key(verdict: Vouched, trust: Trust, signed_at: str) -> None:
    """Say whether the managed key counts."""
    shown = f"sha256:{verdict.key_id[:64]}"
    if verdict.key_id not in trust.keys:
        if trust.anybody:
            verdict.object_to(
                "unknown_key", f"signed with key {shown}, which is not trusted", f"if you know this key: --key {shown}"
            )
        return
    not_after = trust.keys[verdict.key_id]
    if not_after and signed_at > not_after:
        verdict.object_to("unknown_key", f"signed after its key was retired ({not_after})")
        return
    verdict.trusted = True


def _judge_log(verdict: Vouched, envelope: bytes, files: Files, verifier: Verifier, trust: Trust) -> None:
    """Check bundle and timestamps against the trusted root."""
    signature = dsse.open_envelope(envelope).signature
    if trust.root is None:
        verdict.unjudged = files.bundle is not None or files.stamps is not None
        return
    if files.stamps is not None:
        try:
            found, verdict.unknown_times = proof_of_log.check_times(decode_stamps(files.stamps), signature, trust.root)
            verdict.times = found
        except ValueError as e:
            verdict.object_to("bundle_mismatch", f"timestamps: {e}")
            return
    if files.bundle is not None:
        try:
            proof = proof_of_log.check(files.bundle, envelope, verifier, trust.root)
        except ValueError as e:
            verdict.object_to("bundle_mismatch", f"bundle: {e}")
            return
        verdict.logged, verdict.times = proof.logged, proof.times
        verdict.unknown_times = proof.unknown_times


def _judge_identity(verdict: Vouched, pem: bytes, trust: Trust) -> None:
    """Say whether the certificate counts: whose it is, and that it held when it was used."""
    try:
        certificate = certificates.load(pem)
        who = verdict.identity = certificates.identity(certificate)
    except ValueError as e:
        verdict.object_to("malformed", f"certificate: {e}")
        return
    if trust.anybody and who not in trust.identities:
        verdict.object_to(
            "unknown_key",
            f"signed by {who.subject} (vouched for by {who.issuer}), who is not trusted",
            f"if you know who that is: --identity {who.subject} {who.issuer}",
        )
    if trust.root is None:
        verdict.object_to(
            "unknown_key",
            "signed with a certificate, and no trusted root says whose count",
            "name it: --trusted-root FILE",
        )
        return
    if verdict.objections:
        return
    if not verdict.times:
        verdict.object_to("untrusted_time", "nobody who is trusted says when the certificate was used")
        return
    try:
        certificates.check(certificate, [time.at for time in verdict.times], trust.root)
    except ValueError as e:
        verdict.object_to("unknown_key", str(e))
        return
    verdict.trusted = who in trust.identities


def earliest(times: list[TrustedTime]) -> str:
    """Return the first trusted time as RFC 3339, "" for none."""
    return min(time.at for time in times).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if times else ""
