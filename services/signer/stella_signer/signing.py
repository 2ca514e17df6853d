"""The only module that uses the private key."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
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
        return self._seal(payload, ec.ECDSA(hashes.SHA256()))

    def repeatable_envelope(self, payload: bytes) -> bytes:
        """Return the DSSE envelope of a statement's bytes: the same envelope each time (RFC 6979)."""
        try:
            scheme = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        except UnsupportedAlgorithm:
            # OpenSSL before 3.2 cannot; the envelope is as good, and another one each time.
            return self.envelope(payload)
        return self._seal(payload, scheme)

    def _seal(self, payload: bytes, scheme: ec.ECDSA) -> bytes:
        return dsse.seal(payload, self.key_id, self._key.sign(dsse.pae(dsse.PAYLOAD_TYPE, payload), scheme))
