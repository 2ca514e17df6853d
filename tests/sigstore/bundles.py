"""Makes Sigstore bundles straight from the services' APIs, for tests that need some and do not want our signer's."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rfc3161_client import TimestampRequestBuilder

from tests.sigstore.log_entries import encode, pae

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"


@dataclass(frozen=True)
class Signer:
    """A key, and the certificate that Fulcio gave for it, or None for a managed key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate | None = None

    @property
    def spki(self) -> bytes:
        """The public key in DER."""
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def pem(self) -> bytes:
        """The public key in PEM."""
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def hint(self) -> str:
        """The hint of the key in a bundle."""
        return encode(hashlib.sha256(self.spki).digest())


def managed() -> Signer:
    """Return a signer with a key of its own."""
    return Signer(ec.generate_private_key(ec.SECP256R1()))


def keyless(fulcio_url: str, token: str) -> Signer:
    """Return a signer with a certificate for what the token says."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    reply = httpx.post(
        fulcio_url + "/api/v2/signingCert",
        json={"certificateSigningRequest": encode(request.public_bytes(Encoding.PEM))},
        headers={"Authorization": f"Bearer {token}"},
    )
    reply.raise_for_status()
    chain = reply.json()["signedCertificateEmbeddedSct"]["chain"]["certificates"]
    return Signer(key, x509.load_pem_x509_certificate(chain[0].encode()))


def statement(name: str = "000001.ndjson", content: bytes = b'{"seq":1}\n') -> bytes:
    """Return a small in-toto statement about a file."""
    subject = {"name": name, "digest": {"sha256": hashlib.sha256(content).hexdigest()}}
    return json.dumps(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [subject],
            "predicateType": "https://predicate.test/v1",
            "predicate": {},
        }
    ).encode()


def envelope(signer: Signer, payload: bytes) -> dict[str, Any]:
    """Return a DSSE envelope."""
    signature = signer.key.sign(pae(PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
    return {"payload": encode(payload), "payloadType": PAYLOAD_TYPE, "signatures": [{"sig": encode(signature)}]}


def proposal_v1(signer: Signer, sealed: dict[str, Any]) -> dict[str, Any]:
    """Return what Rekor v1 is asked to log: a `dsse` entry."""
    pem = signer.pem if signer.certificate is None else signer.certificate.public_bytes(Encoding.PEM)
    content = {"envelope": json.dumps(sealed), "verifiers": [encode(pem)]}
    return {"apiVersion": "0.0.1", "kind": "dsse", "spec": {"proposedContent": content}}


def request_v2(signer: Signer, sealed: dict[str, Any]) -> dict[str, Any]:
    """Return what Rekor v2 is asked to log: a `hashedrekord` over what the envelope's signature signs."""
    digest = hashlib.sha256(pae(sealed["payloadType"], base64.b64decode(sealed["payload"]))).digest()
    if signer.certificate is None:
        verifier = {"publicKey": {"rawBytes": encode(signer.spki)}}
    else:
        verifier = {"x509Certificate": {"rawBytes": encode(signer.certificate.public_bytes(Encoding.DER))}}
    signature = {
        "content": sealed["signatures"][0]["sig"],
        "verifier": {**verifier, "keyDetails": "PKIX_ECDSA_P256_SHA_256"},
    }
    return {"hashedRekordRequestV002": {"digest": encode(digest), "signature": signature}}


def entry_from_v1(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply of Rekor v1 as a bundle holds it."""
    (entry,) = reply.values()
    proof, body = entry["verification"]["inclusionProof"], json.loads(base64.b64decode(entry["body"]))
    return {
        "logIndex": str(entry["logIndex"]),
        "logId": {"keyId": _hex(entry["logID"])},
        "kindVersion": {"kind": body["kind"], "version": body["apiVersion"]},
        "integratedTime": str(entry["integratedTime"]),
        "inclusionPromise": {"signedEntryTimestamp": entry["verification"]["signedEntryTimestamp"]},
        "inclusionProof": {
            "logIndex": str(proof["logIndex"]),
            "rootHash": _hex(proof["rootHash"]),
            "treeSize": str(proof["treeSize"]),
            "hashes": [_hex(one) for one in proof["hashes"]],
            "checkpoint": {"envelope": proof["checkpoint"]},
        },
        "canonicalizedBody": entry["body"],
    }


def entry_from_v2(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply of Rekor v2 as a bundle holds it: without the promise and the time that it does not give."""
    return {name: value for name, value in reply.items() if name not in ("inclusionPromise", "integratedTime")}


def logged(log_url: str, api: int, signer: Signer, sealed: dict[str, Any]) -> dict[str, Any]:
    """Submit; return the log's entry as a bundle holds it."""
    if api == 1:
        reply = httpx.post(log_url + "/api/v1/log/entries", json=proposal_v1(signer, sealed), timeout=30)
        return entry_from_v1(reply.raise_for_status().json())
    reply = httpx.post(log_url + "/api/v2/log/entries", json=request_v2(signer, sealed), timeout=30)
    return entry_from_v2(reply.raise_for_status().json())


def stamp(tsa_url: str, sealed: dict[str, Any]) -> bytes:
    """Return the authority's reply over the envelope's signature."""
    signature = base64.b64decode(sealed["signatures"][0]["sig"])
    query = TimestampRequestBuilder().data(signature).nonce(nonce=True).build()
    headers = {"Content-Type": "application/timestamp-query"}
    return httpx.post(tsa_url, content=query.as_bytes(), headers=headers).raise_for_status().content


def bundle(
    signer: Signer, sealed: dict[str, Any], entry: dict[str, Any] | None = None, timestamp: bytes | None = None
) -> dict[str, Any]:
    """Return all of it in one bundle."""
    if signer.certificate is None:
        material: dict[str, Any] = {"publicKey": {"hint": signer.hint}}
    else:
        material = {"certificate": {"rawBytes": encode(signer.certificate.public_bytes(Encoding.DER))}}
    material["tlogEntries"] = [] if entry is None else [entry]
    if timestamp is not None:
        material["timestampVerificationData"] = {"rfc3161Timestamps": [{"signedTimestamp": encode(timestamp)}]}
    return {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": sealed}


def signed(log_url: str, api: int, tsa_url: str | None, signer: Signer, payload: bytes) -> dict[str, Any]:
    """Seal, stamp and submit a payload; return the bundle."""
    sealed = envelope(signer, payload)
    timestamp = None if tsa_url is None else stamp(tsa_url, sealed)
    return bundle(signer, sealed, logged(log_url, api, signer, sealed), timestamp)


def _hex(text: str) -> str:
    return encode(bytes.fromhex(text))
