"""Keyless signing: a key made for one chunk, a certificate of a few minutes for it, a timestamp within them.

    OIDC token → certificate (Fulcio) → signature → timestamp → the key is forgotten

What has to be kept is the envelope, the certificate and the timestamp; they come back together or not at all.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import dsse, keys
from stella_shared.evidence.transparency import certificate as certificates
from stella_shared.evidence.transparency import timestamp
from stella_shared.evidence.transparency.certificate import Identity
from stella_signer import tsa
from stella_signer.outside import Later, Outside, Refused
from stella_signer.signing import Signed, seal
from stella_signer.trust_config import Services

_MAX_TOKEN_BYTES: Final = 64 << 10
_PATH: Final = "/api/v2/signingCert"


class _Chain(msgspec.Struct, frozen=True):
    certificates: list[str]


class _Issued(msgspec.Struct, frozen=True):
    chain: _Chain


class _Reply(msgspec.Struct, frozen=True, rename="camel"):
    signed_certificate_embedded_sct: _Issued | None = None
    signed_certificate_detached_sct: _Issued | None = None


class FulcioKey:
    """Signs each statement with a key of its own."""

    def __init__(self, outside: Outside, services: Services, token_file: str) -> None:
        self._outside = outside
        self._services = services
        self._token_file = token_file
        self._identity: Identity | None = None
        self._not_after = ""

    @property
    def identity(self) -> Identity | None:
        """Who the last certificate said we are."""
        return self._identity

    def replace_services(self, services: Services) -> None:
        """Use another trust configuration from the next chunk on."""
        self._services = services

    async def sign(self, payload: bytes) -> Signed:
        """Return the signed statement with its certificate and timestamps.  Raises `Later` or `Refused`."""
        if not self._services.ca or not self._services.tsas:
            raise Refused(
                "keyless signing needs a certificate authority and a timestamp authority in the signing config"
            )
        token = await self._token()
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = await self._certificate(key, token)
        envelope = seal(key, payload)
        signature = dsse.open_envelope(envelope).signature
        stamps = await tsa.stamp(self._outside, self._services, signature)
        at = [timestamp.check(response, signature, self._services.root) for response in stamps]
        try:
            certificates.check(certificate, at, self._services.root)
            self._identity = certificates.identity(certificate)
        except ValueError as e:
            raise Later(f"the certificate authority's answer cannot be used: {e}") from None
        self._not_after = certificate.not_valid_after_utc.isoformat()
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Signed(envelope, keys.key_id(key.public_key()), pem, stamps)

    def describe(self) -> dict[str, str]:
        """Return what `stella signer status` shows."""
        who = self._identity
        return {
            "mode": "fulcio",
            "identity": who.subject if who else "",
            "issuer": who.issuer if who else "",
            "last_certificate_not_after": self._not_after,
        }

    async def _token(self) -> str:
        """Return the OIDC token: out of the file, read anew each time, or the platform's ambient one."""
        if self._token_file:
            try:
                with Path(self._token_file).open("rb") as file:
                    data = file.read(_MAX_TOKEN_BYTES + 1)
            except OSError as e:
                raise Later(f"signals.signing.identity_token_file {self._token_file}: {e.strerror}") from None
            if len(data) > _MAX_TOKEN_BYTES or not data.strip().isascii():
                raise Refused(f"signals.signing.identity_token_file {self._token_file} holds no token")
            return data.decode("ascii").strip()
        with anyio.move_on_after(30):
            token = await anyio.to_thread.run_sync(_ambient, abandon_on_cancel=True)
            if token:
                return token
            raise Later(
                "no OIDC token: this platform has no ambient credential; set signals.signing.identity_token_file"
            )
        raise Later("the platform's ambient credential did not come within 30 s")

    async def _certificate(self, key: ec.EllipticCurvePrivateKey, token: str) -> x509.Certificate:
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
        pem = request.public_bytes(serialization.Encoding.PEM)
        # With the subject's proof of possession in the request itself, the token in the header is all it takes.
        body: dict[str, Any] = {"certificateSigningRequest": base64.b64encode(pem).decode()}
        answer = await self._outside.post(
            self._services.ca.rstrip("/") + _PATH,
            msgspec.json.encode(body),
            "application/json",
            Accept="application/json",
            Authorization=f"Bearer {token}",
        )
        try:
            reply = msgspec.json.decode(answer.body, type=_Reply)
            issued = reply.signed_certificate_embedded_sct or reply.signed_certificate_detached_sct
            if issued is None:
                raise ValueError("no certificate in it")
            certificate = x509.load_pem_x509_certificate(issued.chain.certificates[0].encode())
            if keys.key_id(certificates.key_of(certificate)) != keys.key_id(key.public_key()):
                raise ValueError("it is for another key")
        except (ValueError, IndexError, msgspec.MsgspecError, binascii.Error) as e:
            raise Later(f"the certificate authority's answer cannot be used: {e}") from None
        return certificate


def _ambient() -> str | None:
    from sigstore.oidc import detect_credential

    try:
        return detect_credential()
    except Exception as e:  # each platform's detector raises its own
        raise Later(f"the platform's ambient credential: {e}") from None
