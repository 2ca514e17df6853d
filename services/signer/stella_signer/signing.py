"""The only module that uses the private key."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import dsse, keys


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
        """Return the DSSE envelope of a statement's bytes.  ECDSA is randomised: sign once, keep the bytes."""
        signature = self._key.sign(dsse.pae(dsse.PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256()))
        return dsse.seal(payload, self.key_id, signature)
