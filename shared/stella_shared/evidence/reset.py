"""Leaving a chain for a new one: the old evidence is moved aside whole, and the new chain names it.

    state_directory/reset.json durable → evidence renamed to its sibling → new chain.json → reset.json removed

`begin` does the first step, `store.initialise` all others, however often it is called: a crash anywhere is
completed by the next `init`, `start` or `reset-chain`, with the reason that was given first.
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from stella_shared.errors import ConfigError, StellaError
from stella_shared.evidence import canonical, dsse, keys, names, records, statement
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.records import FORMAT, Chain, Head, Ledger, Predecessor

RESET: Final = "reset.json"
HEAD: Final = "head.json"


class Reset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of `reset.json`: which evidence leaves, under which name, and what the new chain says of it.

    `manifest_sha256` is that of the old `chain.json`, "" when there was none.
    """

    format: int
    manifest_sha256: str
    aside: str
    predecessor: Predecessor


def pending(state: Path) -> Reset | None:
    """Return the reset that was begun and not finished, if any.  Raises `ConfigError` for a damaged file."""
    path = state / RESET
    try:
        return canonical.loads(path.read_bytes(), Reset)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", hint="remove it, and run: stella signals reset-chain --confirm") from None


def is_aside(name: str, chain_id: str) -> bool:
    """Return whether `name` is that of a directory to which a reset moved the evidence of this chain."""
    return re.fullmatch(rf".+-{re.escape(chain_id[:8])}-[0-9]{{8}}T[0-9]{{6}}Z", name) is not None


def begin(evidence: Path, state: Path, reason: str, disk: Disk | None = None) -> Reset:
    """Decide on the reset, durably, and return it.  One that is pending already is returned as it is.

    The caller holds the signer's lock.  The old evidence may be damaged in any way.
    """
    if (found := pending(state)) is not None:
        return found
    newest = newest_head(evidence, state)
    chain_id = newest.chain_id if newest else _chain_id(evidence)
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    reset = Reset(
        FORMAT,
        _manifest_sha256(evidence),
        f"{evidence.name}-{chain_id[:8] or 'unknown'}-{at}",
        Predecessor(chain_id, newest.index if newest else 0, newest.statement_sha256 if newest else "", reason),
    )
    (disk or Disk()).put(state / RESET, canonical.dumps(reset), 0o600)
    return reset


def move_aside(evidence: Path, state: Path, reset: Reset, disk: Disk) -> None:
    """Carry the first half of a reset through: head.json tells of the old chain's end, its evidence is away."""
    newest = newest_head(evidence, state)
    path = state / HEAD
    data = canonical.dumps(newest) if newest else b""
    if newest and (not path.exists() or path.read_bytes() != data):
        disk.put(path, data, 0o600)
    elif newest is None and path.exists():
        disk.rename(path, path.with_name(f"{HEAD}.{reset.aside}"))
        disk.sync_directory(state)
    target = evidence.with_name(reset.aside)
    if target.exists() or _manifest_sha256(evidence) != reset.manifest_sha256 or not _holds_chain(evidence):
        return
    try:
        disk.rename(evidence, target)
    except OSError as e:
        if e.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        raise ConfigError(
            f"{evidence} cannot be renamed: {e.strerror}; it is where another file system is mounted",
            hint="move everything in it to another place, then run: stella signals init",
            runbook="emergency-clear-corrupted-state",
        ) from None
    disk.sync_directory(evidence.parent)


def finish(state: Path, disk: Disk) -> None:
    """Forget the reset: the new chain stands."""
    disk.remove(state / RESET)
    disk.sync_directory(state)


def newest_head(evidence: Path, state: Path) -> Head | None:
    """Return the newest statement that the state or the evidence proves, whichever is newer; None for none.

    From the evidence comes what a trusted key has signed, and whose ledger is whole.
    """
    kept: Head | None = None
    with contextlib.suppress(ValueError, OSError):
        kept = canonical.loads((state / HEAD).read_bytes(), Head)
    try:
        indexes = sorted(
            file.index
            for path in evidence.iterdir()
            if (file := names.parse_chunk_file(path.name)) and file.kind == names.ENVELOPE
        )
        trusted = set(keys.load_trusted(state))
    except (OSError, StellaError):
        return kept
    for index in reversed(indexes):
        with contextlib.suppress(ValueError, OSError):
            found = _head_of_chunk(evidence, index, trusted)
            newer = kept is None or (found.chain_id == kept.chain_id and found.index > kept.index)
            return found if newer else kept
    return kept


def _head_of_chunk(evidence: Path, index: int, trusted: set[str]) -> Head:
    opened = dsse.open_envelope((evidence / names.chunk_file(index, names.ENVELOPE)).read_bytes())
    if opened.key_id not in trusted:
        raise ValueError("not signed with a trusted key")
    key = keys.load_public((evidence / names.KEYS / f"{opened.key_id}.pem").read_bytes())
    if keys.key_id(key) != opened.key_id or not keys.signature_holds(
        key, dsse.pae(dsse.PAYLOAD_TYPE, opened.payload), opened.signature
    ):
        raise ValueError("the signature does not hold")
    stated = statement.decode(opened.payload)
    data = (evidence / names.chunk_file(index, names.LEDGER)).read_bytes()
    if sha256(data).hexdigest() != stated.predicate.accounting.ledger_sha256:
        raise ValueError("the ledger is not the one that was signed")
    return records.head_of(canonical.loads(data, Ledger), sha256(opened.payload).hexdigest(), opened.key_id)


def _manifest_sha256(evidence: Path) -> str:
    try:
        return sha256((evidence / names.CHAIN).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _chain_id(evidence: Path) -> str:
    with contextlib.suppress(ValueError, OSError):
        return canonical.loads((evidence / names.CHAIN).read_bytes(), Chain).chain_id
    return ""


def _holds_chain(evidence: Path) -> bool:
    """Return whether there is anything of a chain: keys alone are none."""
    try:
        return any(path.name == names.CHAIN or names.parse_chunk_file(path.name) for path in evidence.iterdir())
    except FileNotFoundError:
        return False
