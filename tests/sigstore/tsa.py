"""A timestamp authority (RFC 3161) on loopback; `openssl ts -reply` writes its answers, and nothing here changes them.

OpenSSL's command stamps the time of the machine and takes no other, so an authority with a wrong clock cannot be had;
one whose certificate is out of date can (`start`, `end`).
"""

from __future__ import annotations

import base64
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.sigstore.door import Answer, Door, Reply, Request

SERVER = "stella-tsa"
PATH = "/api/v1/timestamp"
_CONFIG = """\
[tsa]
default_tsa = this
[this]
serial = serial
signer_cert = leaf.pem
certs = leaf.pem
signer_key = leaf.key
signer_digest = sha256
default_policy = 1.3.6.1.4.1.57264.2
digests = sha256, sha384, sha512
accuracy = secs:1
ordering = no
tsa_name = no
ess_cert_id_chain = no
ess_cert_id_alg = sha256
"""


class Tsa(Door):
    """Stamps what is posted to `url`, with a certificate of an authority of its own.

    `status` is that of a good answer: the RFC's HTTP says 200, Sigstore's authority 201.
    The switches are those of `Door` (the endpoint is `stamp`), and `wrong_nonce`, `wrong_digest` and `reject`.
    """

    def __init__(self, *, name: str = "test tsa", start: datetime | None = None, end: datetime | None = None) -> None:
        super().__init__(self._answers, SERVER, faults_on="stamp")
        self.url += PATH
        self.status = 201
        self.start = start or datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
        self.end = end or self.start + timedelta(days=3650)
        self._name = name
        self._wrong: list[str] = []
        # One at a time: openssl rewrites the file of serial numbers.
        self._turn = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="tsa-")
        self._write(Path(self._folder.name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._folder.cleanup()

    def wrong_nonce(self, n: int = 1) -> None:
        """Answer the next `n` requests as if they had another nonce."""
        self._wrong += ["nonce"] * n

    def wrong_digest(self, n: int = 1) -> None:
        """Answer the next `n` requests as if they were for other data."""
        self._wrong += ["digest"] * n

    def reject(self, n: int = 1) -> None:
        """Answer the next `n` requests with a good status and a reply that says no (RFC 3161, 2.4.2)."""
        self._wrong += ["all"] * n

    def trusted_root_tsa(self) -> dict[str, Any]:
        """Return what a trusted_root.json says of this authority under `timestampAuthorities`."""
        chain = [base64.b64encode(one.public_bytes(Encoding.DER)).decode() for one in (self.leaf, self.root)]
        return {
            "subject": {"organization": "test", "commonName": self._name},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": one} for one in chain]},
            "validFor": {"start": _rfc3339(self.start), "end": _rfc3339(self.end)},
        }

    def _write(self, folder: Path) -> None:
        """Make the two keys and certificates, and what openssl needs of them."""
        root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        root_name, leaf_name = _name(f"{self._name} root"), _name(self._name)
        self.root = (
            self._certificate(root_name, root_key)
            .issuer_name(root_name)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .sign(root_key, hashes.SHA256())
        )
        self.leaf = (
            self._certificate(leaf_name, leaf_key)
            .issuer_name(root_name)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
            .sign(root_key, hashes.SHA256())
        )
        (folder / "leaf.pem").write_bytes(self.leaf.public_bytes(Encoding.PEM))
        pem = leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "leaf.key").write_bytes(pem)
        (folder / "serial").write_text("01\n")
        (folder / "tsa.cnf").write_text(_CONFIG)

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.start)
            .not_valid_after(self.end)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    def _answers(self, request: Request) -> tuple[str, Answer] | None:
        return ("stamp", self._stamp) if (request.method, request.path) == ("POST", PATH) else None

    def _stamp(self, request: Request) -> Reply:
        if request.headers.get("content-type") != "application/timestamp-query":
            return Reply(415, b"application/timestamp-query is wanted\n")
        folder = Path(self._folder.name)
        with self._turn:
            query = _altered(request.body, self._wrong.pop(0)) if self._wrong else request.body
            (folder / "query").write_bytes(query)
            done = subprocess.run(
                ["openssl", "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query"],
                cwd=folder, capture_output=True, check=False,
            )  # fmt: skip
        if done.returncode:
            return Reply(400, done.stderr)
        return Reply(self.status, done.stdout, {"Content-Type": "application/timestamp-reply"})


def _name(common: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "test"), x509.NameAttribute(NameOID.COMMON_NAME, common)]
    )


def _usage(**given: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: given.get(name, False) for name in names})


def _rfc3339(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _elements(der: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield (tag, end) of each element of DER from `start` on."""
    while start < len(der):
        tag, length, start = der[start], der[start + 1], start + 2
        if length & 0x80:
            octets = length & 0x7F
            length, start = int.from_bytes(der[start : start + octets], "big"), start + octets
        start += length
        yield tag, start


def _altered(query: bytes, what: str) -> bytes:
    """Return a TimeStampReq (RFC 3161, 2.4.1) whose nonce or digest differs in one bit, or that is none."""
    if what == "all":
        return b"?"
    head = 2 if query[1] < 0x80 else 2 + (query[1] & 0x7F)
    # version, then messageImprint (0x30), reqPolicy or not (0x06), nonce (0x02), certReq (0x01)
    ends = dict(list(_elements(query, head))[1:])
    last = ends[{"digest": 0x30, "nonce": 0x02}[what]] - 1
    return query[:last] + bytes([query[last] ^ 1]) + query[last + 1 :]
