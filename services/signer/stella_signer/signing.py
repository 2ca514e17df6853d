"""Keys that sign: the only module that uses the local private key.

    LocalKey    the node's own P-256 key: at once, in place
    RemoteKey   a KMS or HSM (`kms`), or a certificate of a few minutes (`fulcio`): may take time, and may fail

An ECDSA signature is another one each time: sign once, keep the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import dsse, keys


class Signed(msgspec.Struct, frozen=True):
    """An envelope's bytes, and what a keyless signature must be kept with: certificate (PEM) and timestamps."""

    envelope: bytes
    key_id: str
    certificate: bytes = b""
    timestamps: list[bytes] = []


class RemoteKey(Protocol):
    """A key that is somewhere else."""

    async def sign(self, payload: bytes) -> Signed:
        """Return the signed statement.  Raises `Later` or `Refused`; nothing was kept then."""

    def describe(self) -> dict[str, str]:
        """Return what `stella signer status` shows: mode, key id or identity."""


class LocalKey:
    """Signs statements with the node's own P-256 key."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key
        self.key_id = keys.key_id(key.public_key())

    @classmethod
    def load(cls, state_directory: Path) -> LocalKey:
        """Load the key.  Raises as `keys.load_local_key` does."""
        return cls(keys.load_local_key(state_directory))

    def envelope(self, payload: bytes) -> bytes:
        """Return the DSSE envelope of a statement's bytes."""
        return seal(self._key, payload)

    def repeatable_envelope(self, payload: bytes) -> bytes:
        """Return the DSSE envelope of a statement's bytes: the same envelope each time (RFC 6979)."""
        try:
            scheme = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        except UnsupportedAlgorithm:
            # OpenSSL before 3.2 cannot; the envelope is as good, and another one each time.
            return self.envelope(payload)
        return seal(self._key, payload, scheme)

    def describe(self) -> dict[str, str]:
        """Return what `stella signer status` shows."""
        return {"mode": "local", "key_id": f"sha256:{self.key_id}", "key_hint": keys.key_hint(self.key_id)}


def seal(key: ec.EllipticCurvePrivateKey, payload: bytes, scheme: ec.ECDSA | None = None) -> bytes:
    """Return the DSSE envelope of a statement's bytes, signed with `key`."""
    signature = key.sign(dsse.pae(dsse.PAYLOAD_TYPE, payload), scheme or ec.ECDSA(hashes.SHA256()))
    return dsse.seal(payload, keys.key_id(key.public_key()), signature)
