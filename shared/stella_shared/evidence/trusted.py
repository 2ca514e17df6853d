"""Whom a node trusts, out of its state directory."""

from __future__ import annotations

from pathlib import Path

from stella_shared.errors import ConfigError, NotPermitted
from stella_shared.evidence import keys
from stella_shared.evidence.directory import read
from stella_shared.evidence.store import TRUST, TRUSTED_ROOT
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.trust import parse
from stella_shared.evidence.vouching import Trust


def node_trust(state: Path) -> Trust:
    """Return whom a node trusts: its own keys and identities, and the root that it used last.

    Raises `NotPermitted` and `ConfigError` as `keys.load_trust`.
    """
    listed = keys.load_trust(state)
    path = state / TRUST / TRUSTED_ROOT
    try:
        root = parse(read(path)) if path.exists() else None
    except PermissionError as e:
        raise NotPermitted(f"{path}: {e.strerror}", hint="run as the owner of the state directory") from None
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", hint="remove it: the signer writes it anew from its configuration") from None
    return Trust(
        {key.key_id: key.not_after for key in listed.keys},
        frozenset(Identity(who.subject, who.issuer) for who in listed.identities),
        root,
    )
