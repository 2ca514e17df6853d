"""Fulcio on loopback: the certificate authority and certificate log of npm's `@sigstore/mock`, behind a front of ours.

The mock's certificates, signed certificate timestamps and extensions are real ones.
It does not look at what the token or the signing request proves; the front does, but for the token's signature.
"""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.sigstore.door import Answer, Door, Reply, Request, json_reply
from tests.sigstore.trust import LONG_AGO

SERVER = "stella-fulcio-front"
PATH = "/api/v2/signingCert"
AUDIENCE = "sigstore"
LIFETIME_SECONDS = 600
# Without the signature, PyJWT looks at nothing that is not named.
_CLAIMS: Any = {"verify_signature": False, "verify_exp": True, "verify_aud": True, "require": ["iss", "sub", "exp"]}
_TOKEN_KEY = ec.generate_private_key(ec.SECP256R1())


def identity_token(
    subject: str = "spiffe://test/node", issuer: str = "https://issuer.test", seconds: int = 600, **claims: Any
) -> str:
    """Return an OIDC token for Fulcio, which ends in so many seconds."""
    now = int(time.time())
    content = {"iss": issuer, "sub": subject, "aud": AUDIENCE, "iat": now - 5, "exp": now + seconds, **claims}
    return jwt.encode(content, _TOKEN_KEY, algorithm="ES256")


class Fulcio(Door):
    """Issues certificates at `url` + `/api/v2/signingCert`; the subject of the token becomes a URI in it.

    `seconds_left` is how long a certificate is still valid when it is issued, of ten minutes: its start moves back.
    The switches are those of `Door`; the endpoint is `certificate`.
    """

    def __init__(self) -> None:
        super().__init__(self._answers, SERVER, faults_on="certificate")
        self.seconds_left = LIFETIME_SECONDS
        self._turn = threading.Lock()

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            ["node", "fulcio.mjs"],
            cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = json.loads(self._line())
        self._root, self._ctlog = said["root"], said["ctlog"]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            # Without input it ends by itself.
            self._child.communicate(timeout=10)

    def trusted_root_parts(self) -> dict[str, list[dict[str, Any]]]:
        """Return what a trusted_root.json says of this authority: its `certificateAuthorities` and `ctlogs`."""
        key = base64.b64decode(self._ctlog)
        authority = {
            "subject": {"organization": "sigstore.mock", "commonName": "sigstore"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": self._root}]},
            "validFor": {"start": LONG_AGO},
        }
        ctlog = {
            "baseUrl": self.url,
            "hashAlgorithm": "SHA2_256",
            "publicKey": {
                "rawBytes": self._ctlog,
                "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                "validFor": {"start": LONG_AGO},
            },
            "logId": {"keyId": base64.b64encode(hashlib.sha256(key).digest()).decode()},
        }
        return {"certificateAuthorities": [authority], "ctlogs": [ctlog]}

    def _line(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        assert line, "node ended: are the packages of tests/sigstore/package.json installed?"
        return line

    def _answers(self, request: Request) -> tuple[str, Answer] | None:
        return ("certificate", self._issue) if (request.method, request.path) == ("POST", PATH) else None

    def _issue(self, request: Request) -> Reply:
        asked = json.loads(request.body)
        # The token comes in the header or in the body.
        token = asked.get("credentials", {}).get("oidcIdentityToken")
        token = token or request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            jwt.decode(token, options=_CLAIMS, audience=AUDIENCE)
        except jwt.InvalidTokenError as refusal:
            return json_reply(401, {"code": 16, "message": f"the identity token is refused: {refusal}", "details": []})
        try:
            # The field is bytes, which JSON writes as base64; the bytes are PEM.
            pem = base64.b64decode(asked["certificateSigningRequest"], validate=True)
            proven = x509.load_pem_x509_csr(pem).is_signature_valid
        except (KeyError, ValueError) as refusal:
            return json_reply(400, {"code": 3, "message": f"no signing request: {refusal}", "details": []})
        if not proven:
            return json_reply(400, {"code": 3, "message": "the signing request does not verify", "details": []})
        question = {
            "ageSeconds": LIFETIME_SECONDS - self.seconds_left,
            "request": {"credentials": {"oidcIdentityToken": token}, "certificateSigningRequest": pem.decode()},
        }
        with self._turn:
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            answer = json.loads(self._line())
        return Reply(answer["status"], answer["body"].encode(), {"Content-Type": "application/json"})
