"""Keys: ECDSA P-256, known by the SHA-256 of their SubjectPublicKeyInfo in DER.

state_directory/keys/signing.key    PKCS#8 PEM, 0600: read by the signer alone
state_directory/keys/trusted.json   the key ids whose signatures count here, with their validity
evidence/keys/<key id>.pem          public keys: for whoever verifies; they prove nothing by lying there
"""

from __future__ import annotations

import base64
from hashlib import sha256
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.errors import ConfigError, NotFound, NotPermitted
from stella_shared.evidence import canonical
from stella_shared.evidence.disk import Disk

ALGORITHM = "ecdsa-p256-sha256"
SIGNING_KEY = "signing.key"
TRUSTED = "trusted.json"


class TrustedKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A key that counts.  `not_after` is empty while it is in use."""

    key_id: str
    algorithm: str
    not_before: str
    not_after: str = ""


class TrustedIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A keyless identity that counts: the certificate's subject, and who vouched for it."""

    subject: str
    issuer: str
    not_before: str


class TrustedKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON of `trusted.json`."""

    format: int
    keys: list[TrustedKey]
    identities: list[TrustedIdentity] = []


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """Return the key's id: hex SHA-256 of its SPKI DER."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(der).hexdigest()


def key_hint(identity: str) -> str:
    """Return a key id in the base64 form that Sigstore bundles use as `hint`."""
    return base64.b64encode(bytes.fromhex(identity)).decode()


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the PEM text of a public key, as it stands in `evidence/keys/`."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Return a P-256 public key.  Raises `ValueError` unless `pem` is exactly what `public_pem` writes."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as e:
        raise ValueError(f"no public key: {e}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not an ECDSA P-256 key")
    if public_pem(key) != pem:
        raise ValueError("not canonical: the PEM text has something more, or other spacing")
    return key


def signature_holds(key: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """Return whether `signature` (DER) is the key's signature over SHA-256 of `message`."""
    try:
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def create_local_key(state_directory: Path, disk: Disk | None = None) -> ec.EllipticCurvePrivateKey:
    """Make a P-256 signing key, 0600, durably.  Raises `ConfigError` when one is there already."""
    path = state_directory / "keys" / SIGNING_KEY
    if path.exists():
        raise ConfigError(f"{path} exists already", hint="a signing key is never overwritten: move it away first")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (disk or Disk()).put(path, pem, 0o600)
    return key


def load_local_key(state_directory: Path) -> ec.EllipticCurvePrivateKey:
    """Return the signing key.

    Raises `NotFound` when there is none, `NotPermitted` when others may read it or we may not, and
    `ConfigError` when the file holds no P-256 key.
    """
    path = state_directory / "keys" / SIGNING_KEY
    try:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise NotPermitted(
                f"{path} has mode {mode:04o}: others can read the signing key",
                hint=f"chmod 600 {path}; if somebody may have read it, retire it",
            )
        pem = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"no signing key at {path}", hint="run: stella signals init") from None
    except PermissionError as e:
        raise NotPermitted(
            f"{path}: {e.strerror}", hint="the signer must run as the owner of the state directory"
        ) from None
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as e:
        raise ConfigError(f"{path} holds no usable private key: {e}", hint="restore it from a backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{path} is not an ECDSA P-256 key", hint="restore it from a backup")
    return key


def load_trusted(state_directory: Path) -> dict[str, TrustedKey]:
    """Return the trusted keys by id; {} when there is no list.  Raises `ConfigError` for a broken list."""
    return {key.key_id: key for key in load_trust(state_directory).keys}


def load_trust(state_directory: Path) -> TrustedKeys:
    """Return who is trusted here: nobody when there is no list.  Raises `ConfigError` for a broken list."""
    path = state_directory / "keys" / TRUSTED
    try:
        return canonical.loads(path.read_bytes(), TrustedKeys)
    except (FileNotFoundError, NotADirectoryError):
        return TrustedKeys(1, [])
    except PermissionError as e:
        raise NotPermitted(
            f"{path}: {e.strerror}", hint="run as the owner of the state directory, or name a key: --key sha256:<id>"
        ) from None
    except ValueError as e:
        raise ConfigError(
            f"{path}: {e}", hint="restore it from a backup, or remove it and run: stella signals init"
        ) from None


def save_trust(state_directory: Path, trusted: TrustedKeys, disk: Disk | None = None) -> None:
    """Write the list of those who are trusted, durably."""
    (disk or Disk()).put(state_directory / "keys" / TRUSTED, canonical.dumps(trusted), 0o600)
