"""Keyless signatures: a short-lived certificate says whose key it was, if its authority is trusted.

The chain and the identity are checked here, for chunks that are in no log yet; once there is a log entry,
sigstore-python checks the whole bundle as well, and with it the certificate's own log (SCT).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store, VerificationError

from stella_shared.evidence.transparency.trust import TrustRoot

MAX_BYTES: Final = 16 << 10
#: Fulcio's issuer extensions: a DER UTF8String, and before that the bare text.
_ISSUER_V2: Final = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_ISSUER_V1: Final = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
#: What reading extensions may raise beside `ValueError`.
_EXTENSION_ERRORS: Final = (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


class Identity(msgspec.Struct, frozen=True, order=True):
    """Who may sign: the certificate's subject (a URI or an e-mail address) and who said so."""

    subject: str
    issuer: str


def load(pem: bytes) -> x509.Certificate:
    """Return the certificate of `NNNNNN.cert.pem`.  Raises `ValueError` unless it is one P-256 leaf, canonical PEM."""
    if len(pem) > MAX_BYTES:
        raise ValueError(f"a certificate of {len(pem)} bytes is over {MAX_BYTES}")
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except x509.InvalidVersion as e:
        raise ValueError(str(e)) from None
    if certificate.public_bytes(serialization.Encoding.PEM) != pem:
        raise ValueError("not canonical: the PEM text has something more, or other spacing")
    # The signature ends the certificate, as a bit string: unused bits in it would be another text for the same.
    der = certificate.public_bytes(serialization.Encoding.DER)
    if not der.endswith(b"\0" + certificate.signature):
        raise ValueError("not canonical: a signature with unused bits")
    key_of(certificate)
    return certificate


def key_of(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Return the certificate's key.  Raises `ValueError` unless it is ECDSA P-256."""
    try:
        key = certificate.public_key()
    except UnsupportedAlgorithm as e:
        raise ValueError(f"the certificate's key: {e}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("the certificate's key is not ECDSA P-256")
    return key


def identity(certificate: x509.Certificate) -> Identity:
    """Return whom the certificate names.  Raises `ValueError` when it names nobody, or more than one."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        subjects = [str(name.value) for name in names]
        issuers = {e.oid: e.value for e in certificate.extensions if e.oid in (_ISSUER_V1, _ISSUER_V2)}
    except (*_EXTENSION_ERRORS, ValueError) as e:
        raise ValueError(f"the certificate names nobody: {e}") from None
    if len(subjects) != 1 or not issuers:
        raise ValueError(f"the certificate names {len(subjects)} subjects and {len(issuers)} issuers")
    if _ISSUER_V2 in issuers:
        raw = issuers[_ISSUER_V2].value
        # A DER UTF8String under 128 bytes, or with a long length.
        text = raw[2:] if raw[1:2] < b"\x80" else raw[2 + (raw[1] & 0x7F) :]
    else:
        text = issuers[_ISSUER_V1].value
    try:
        return Identity(subjects[0], text.decode())
    except UnicodeDecodeError:
        raise ValueError("the certificate's issuer is no text") from None


def check(certificate: x509.Certificate, at: Sequence[datetime], root: TrustRoot) -> None:
    """Make sure that a trusted authority issued it, for signing, and that it held at each time in `at`.

    Raises `ValueError`, also when there is no trusted time at all.
    """
    if not at:
        raise ValueError("no trusted time: nobody can say whether the certificate held when it was used")
    authorities = [a for a in root.certificate_authorities if all(a.validity.holds(when) for when in at)]
    store = [c for a in authorities for c in a.certificates]
    if not store:
        raise ValueError("no certificate authority is trusted at that time")
    # Fulcio's leaves are for code signing and carry extensions that a web certificate does not.
    ca_policy = ExtensionPolicy.webpki_defaults_ca().may_be_present(
        x509.ExtendedKeyUsage, Criticality.NON_CRITICAL, None
    )
    leaf_policy = ExtensionPolicy.webpki_defaults_ee().may_be_present(
        x509.ExtendedKeyUsage, Criticality.NON_CRITICAL, None
    )
    try:
        for when in at:
            PolicyBuilder().store(Store(store)).time(when).extension_policies(
                ca_policy=ca_policy, ee_policy=leaf_policy
            ).build_client_verifier().verify(certificate, [])
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (VerificationError, *_EXTENSION_ERRORS, ValueError) as e:
        raise ValueError(f"the certificate does not hold: {e}") from None
    if not usage.digital_signature or ExtendedKeyUsageOID.CODE_SIGNING not in extended:
        raise ValueError("the certificate is not for signing")


def check_with_sigstore(bundle: bytes, who: Identity, root: TrustRoot) -> None:
    """Have sigstore-python verify a certificate bundle with its log entry.  Raises `ValueError`."""
    from sigstore.models import Bundle, TrustedRoot
    from sigstore.verify import Verifier, policy
    from sigstore_models.trustroot.v1 import TrustedRoot as TrustedRootModel

    try:
        trusted = TrustedRoot(TrustedRootModel.from_json(root.document))
        wanted = policy.Identity(identity=who.subject, issuer=who.issuer)
        Verifier(trusted_root=trusted).verify_dsse(Bundle.from_json(bundle), wanted)
    except Exception as e:  # it raises AttributeError and others for malformed entries, too
        raise ValueError(f"sigstore refuses the bundle: {_first_line(e)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
