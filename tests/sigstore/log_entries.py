"""What a log makes of a submission: it is checked, and written in the one form that goes into the tree.

Rekor v1 takes `dsse` and `hashedrekord` 0.0.1, Rekor v2 `hashedrekord` 0.0.2.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

# What Rekor v2 takes of elliptic curves.  Pure Ed25519 is not among it: there is no message to verify, only its digest.
_V2_KEYS: dict[str, tuple[type[ec.EllipticCurve], hashes.HashAlgorithm, str]] = {
    "PKIX_ECDSA_P256_SHA_256": (ec.SECP256R1, hashes.SHA256(), "SHA2_256"),
    "PKIX_ECDSA_P384_SHA_384": (ec.SECP384R1, hashes.SHA384(), "SHA2_384"),
    "PKIX_ECDSA_P521_SHA_512": (ec.SECP521R1, hashes.SHA512(), "SHA2_512"),
}


class RefusedError(Exception):
    """The submission is not one that the log takes."""


def encode(data: bytes) -> str:
    """Return standard base64."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """Return what strict standard base64 holds."""
    return base64.b64decode(text, validate=True)


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return what a DSSE signature signs."""
    name = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def body_v1(proposed: Any) -> bytes:
    """Return the entry of a v1 proposal; raise `RefusedError` for one that does not hold."""
    return _refusing(_v1, proposed)


def body_v2(request: Any) -> bytes:
    """Return the entry of a v2 request; raise `RefusedError` for one that does not hold."""
    return _refusing(_v2, request)


def _refusing(make: Callable[[Any], bytes], submission: Any) -> bytes:
    try:
        return make(submission)
    except InvalidSignature as error:
        raise RefusedError("signature does not verify") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error


def _v1(proposed: Any) -> bytes:
    kind, version, spec = proposed["kind"], proposed["apiVersion"], proposed["spec"]
    if (kind, version) == ("dsse", "0.0.1"):
        entry = _dsse(spec)
    elif (kind, version) == ("hashedrekord", "0.0.1"):
        entry = _hashedrekord_v1(spec)
    else:
        raise RefusedError(f"no such kind: {kind} {version}")
    return rfc8785.dumps({"apiVersion": version, "kind": kind, "spec": entry})


def _dsse(spec: Any) -> Any:
    content = spec["proposedContent"]
    envelope = json.loads(content["envelope"])
    payload = decode(envelope["payload"])
    message = pae(envelope["payloadType"], payload)
    verifiers = [_verifier(decode(verifier)) for verifier in content["verifiers"]]
    if not envelope["signatures"]:
        raise RefusedError("an envelope without signatures")
    signatures = []
    for signature in envelope["signatures"]:
        pem = next((pem for pem, key in verifiers if _signs(key, decode(signature["sig"]), message)), None)
        if pem is None:
            raise RefusedError("could not verify envelope")
        signatures.append({"signature": signature["sig"], "verifier": encode(pem)})
    return {
        # The hash is over the text as it was sent: the same envelope written otherwise is another entry.
        "envelopeHash": _sha256(content["envelope"].encode()),
        "payloadHash": _sha256(payload),
        "signatures": sorted(signatures, key=lambda one: one["signature"]),
    }


def _hashedrekord_v1(spec: Any) -> Any:
    digest, signature = spec["data"]["hash"], spec["signature"]
    if digest["algorithm"] != "sha256":
        raise RefusedError("only sha256 is taken")
    pem, key = _verifier(decode(signature["publicKey"]["content"]))
    _verify_digest(key, decode(signature["content"]), bytes.fromhex(digest["value"]), hashes.SHA256())
    return {
        "data": {"hash": {"algorithm": "sha256", "value": digest["value"]}},
        "signature": {"content": signature["content"], "publicKey": {"content": encode(pem)}},
    }


def _v2(request: Any) -> bytes:
    if set(request) != {"hashedRekordRequestV002"}:
        raise RefusedError("invalid type, must be hashedrekord")
    content = request["hashedRekordRequestV002"]
    signature = content["signature"]
    verifier = signature["verifier"]
    details = verifier["keyDetails"]
    if details not in _V2_KEYS:
        raise RefusedError(f"no such signing algorithm: {details}")
    form = next(form for form in ("publicKey", "x509Certificate") if form in verifier)
    raw = decode(verifier[form]["rawBytes"])
    key = load_der_public_key(raw) if form == "publicKey" else x509.load_der_x509_certificate(raw).public_key()
    curve, algorithm, name = _V2_KEYS[details]
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, curve):
        raise RefusedError("the key is not what keyDetails says")
    _verify_digest(key, decode(signature["content"]), decode(content["digest"]), algorithm)
    entry: dict[str, Any] = {
        "data": {"algorithm": name, "digest": encode(decode(content["digest"]))},
        "signature": {
            "content": encode(decode(signature["content"])),
            "verifier": {"keyDetails": details, form: {"rawBytes": encode(raw)}},
        },
    }
    return rfc8785.dumps({"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": {"hashedRekordV002": entry}})


def _sha256(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _verifier(pem: bytes) -> tuple[bytes, Any]:
    """Return a PEM certificate or key as Rekor writes it, and its key."""
    if b"BEGIN CERTIFICATE" in pem:
        certificate = x509.load_pem_x509_certificate(pem)
        return certificate.public_bytes(Encoding.PEM), certificate.public_key()
    key = load_pem_public_key(pem)
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), key


def _signs(key: Any, signature: bytes, message: bytes) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _verify_digest(key: Any, signature: bytes, digest: bytes, algorithm: hashes.HashAlgorithm) -> None:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RefusedError("only keys on elliptic curves sign digests here")
    key.verify(signature, digest, ec.ECDSA(Prehashed(algorithm)))
