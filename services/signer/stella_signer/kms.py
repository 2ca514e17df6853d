"""Keys in a KMS or HSM, by securesystemslib's URIs.  ECDSA P-256 only: what every verifier and log takes.

The public key is asked for once and recorded: in `state_directory/keys/kms.json` with its URI, in the evidence
as `keys/<key id>.pem`, and in the list of trusted keys.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import anyio
import anyio.to_thread
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.config import Signing
from stella_shared.errors import ConfigError, NotFound, StellaError
from stella_shared.evidence import canonical, dsse, keys
from stella_shared.evidence.disk import Disk
from stella_signer.outside import Later, Refused
from stella_signer.signing import Signed

_RECORD: Final = "kms.json"
_SIGN_SECONDS: Final = 30.0


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kms.json`: which public key the URI stands for."""

    format: int
    uri: str
    public_key: str


class KmsKey:
    """Signs with a key that never leaves its KMS or HSM."""

    def __init__(self, uri: str, key: ec.EllipticCurvePublicKey, signer: Any) -> None:
        self._uri = uri
        self._key = key
        self._signer = signer
        self.key_id = keys.key_id(key)

    @classmethod
    def load(cls, signing: Signing, state: Path, disk: Disk | None = None) -> KmsKey:
        """Return the key of `signing.key_id`; its public key is recorded at the first time.  Blocks.

        Raises `ConfigError` for a URI or key that cannot be used, `NotFound` when the service has no such key.
        """
        uri = signing.key_id
        if signing.pkcs11_module:
            os.environ["PYKCS11LIB"] = signing.pkcs11_module
        public = _recorded(state, uri) or _fetched(uri, _secrets(signing))
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise ConfigError(f"signals.signing.key_id {uri}: not an ECDSA P-256 key", hint="make a P-256 key for it")
        library = _library()
        try:
            named = library.SSlibKey.from_crypto(public, scheme="ecdsa-sha2-nistp256")
            signer = library.Signer.from_priv_key_uri(uri, named, _secrets(signing))
        except StellaError:
            raise
        except Exception as e:  # each KMS's library raises its own
            raise ConfigError(f"signals.signing.key_id {uri}: {e}", hint=_hint(uri)) from None
        path = state / "keys" / _RECORD
        if not path.exists():
            record = _Record(1, uri, keys.public_pem(public).decode())
            (disk or Disk()).put(path, canonical.dumps(record), 0o600)
        return cls(uri, public, signer)

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public key."""
        return self._key

    async def sign(self, payload: bytes) -> Signed:
        """Return the signed statement.  What comes back is verified before anybody keeps it."""
        message = dsse.pae(dsse.PAYLOAD_TYPE, payload)
        with anyio.move_on_after(_SIGN_SECONDS):
            signature = await anyio.to_thread.run_sync(self._ask, message, abandon_on_cancel=True)
            if not keys.signature_holds(self._key, message, signature):
                raise Refused(f"{self._uri} signs with another key than the one recorded")
            return Signed(dsse.seal(payload, self.key_id, signature), self.key_id)
        raise Later(f"{self._uri} did not sign within {_SIGN_SECONDS:.0f} s")

    def _ask(self, message: bytes) -> bytes:
        try:
            return bytes.fromhex(self._signer.sign(message).signature)
        except StellaError:
            raise
        except Exception as e:  # each KMS's library raises its own
            raise Later(f"{self._uri}: {e}") from None

    def describe(self) -> dict[str, str]:
        """Return what `stella signer status` shows."""
        return {
            "mode": "kms",
            "uri": self._uri,
            "key_id": f"sha256:{self.key_id}",
            "key_hint": keys.key_hint(self.key_id),
        }


def _secrets(signing: Signing) -> Callable[[str], str]:
    def secret(what: str) -> str:
        try:
            return Path(signing.pin_file).read_text("utf-8").strip()
        except OSError as e:
            raise ConfigError(
                f"signals.signing.pin_file {signing.pin_file or '(empty)'}: {e.strerror}",
                hint=f"it must hold the {what} of {signing.key_id}, and be readable by the signer",
            ) from None

    return secret


def _recorded(state: Path, uri: str) -> ec.EllipticCurvePublicKey | None:
    try:
        record = canonical.loads((state / "keys" / _RECORD).read_bytes(), _Record)
        if record.uri != uri:
            raise ConfigError(
                f"{state / 'keys' / _RECORD} is of {record.uri}, signals.signing.key_id is {uri}",
                hint="remove that file to use the other key from now on; the former one stays trusted",
            )
        return keys.load_public(record.public_key.encode())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"{state / 'keys' / _RECORD}: {e}", hint="remove it: it is made again") from None


def _fetched(uri: str, secrets: Callable[[str], str]) -> Any:
    """Ask the service for the public key."""
    try:
        return _importers(uri, secrets)
    except StellaError:
        raise
    except Exception as e:  # each KMS's library raises its own
        raise NotFound(f"signals.signing.key_id {uri}: {e}", hint=_hint(uri)) from None


def _importers(uri: str, secrets: Callable[[str], str]) -> Any:
    library = _library()
    parts = urlsplit(uri)
    match parts.scheme:
        case "hsm":
            label = parse_qs(parts.query).get("label", [None])[0]
            number = int(parts.path) if parts.path else None
            _, key = library.HSMSigner.import_(number, label, secrets)
        case "awskms":
            _, key = library.AWSSigner.import_(parts.path.lstrip("/"))
        case "gcpkms":
            _, key = library.GCPSigner.import_(parts.path.lstrip("/"))
        case "azurekms":
            vault, _, name = uri.removeprefix("azurekms://").partition("/keys/")
            _, key = library.AzureSigner.import_(vault.partition(".")[0], name.partition("/")[0])
        case "file2":
            return serialization.load_pem_private_key(Path(parts.path).read_bytes(), None).public_key()
        case other:
            raise ConfigError(
                f"signals.signing.key_id {uri}: no KMS of scheme {other!r} is known",
                hint="known: awskms, gcpkms, azurekms, hsm, file2",
            )
    return serialization.load_pem_public_key(key.keyval["public"].encode())


def _library() -> Any:
    """Return securesystemslib's signers.  (It re-exports them in a way that type checkers do not follow.)"""
    return importlib.import_module("securesystemslib.signer")


def _hint(uri: str) -> str:
    if uri.startswith("hsm:"):
        return "is signals.signing.pkcs11_module the HSM's library, and python-pkcs11 installed (extra `hsm`)?"
    return "is the service reachable, its client library installed, and the key there?"
