"""The evidence directory and its half of the state directory: made, checked, read back.

    output_directory/   chain.json, keys/*.pem, the chunks' files
    state_directory/    keys/signing.key, keys/trusted.json, head.json, notes/

`initialise` may be called any number of times: it completes what a crash left half done, and refuses what no
crash of ours can leave.
"""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared import clock, config
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound, NotPermitted, StellaError, TryAgain
from stella_shared.evidence import canonical, keys, names, reset
from stella_shared.evidence.disk import TMP_SUFFIX, Disk
from stella_shared.evidence.records import FORMAT, Chain, Head, Predecessor
from stella_shared.evidence.transparency.certificate import Identity

HEAD = reset.HEAD
#: Held (flock) by the signer of the chain, in the state directory.
SIGNER_LOCK = "signer.lock"
#: Where in the state directory the signer keeps the trust configuration that it used last.
TRUST = "trust"
TRUSTED_ROOT = "trusted_root.json"


class Places(msgspec.Struct, frozen=True):
    """Where a node keeps its evidence and its state."""

    evidence: Path
    state: Path

    @property
    def head(self) -> Path:
        """The file that remembers the newest statement outside the evidence."""
        return self.state / HEAD

    @property
    def notes(self) -> Path:
        """The directory of notes that wait for the signer."""
        return self.state / "notes"

    def chunk(self, index: int, kind: str) -> Path:
        """Return the path of one of a chunk's files."""
        return self.evidence / names.chunk_file(index, kind)


def places(signals: Signals) -> Places:
    """Return where `signals` puts evidence and state."""
    return Places(Path(signals.output_directory), config.state_directory(signals))


class Initialised(msgspec.Struct, frozen=True):
    """What `initialise` found or made."""

    chain_id: str
    node: str
    key_id: str
    evidence: str
    state: str
    new_chain: bool
    new_key: bool
    predecessor: Predecessor | None


def initialise(signals: Signals, disk: Disk | None = None) -> Initialised:
    """Make directories, key and chain where they are missing; leave everything else as it is.

    An evidence directory that was emptied gets a new chain, whose predecessor is the one `head.json` tells
    of.  A reset that was begun is carried through first.  Raises `ConfigError`, naming the fix, when what is
    there is corrupt or half there, and `NotPermitted` when the file system refuses.
    """
    disk = disk or Disk()
    where = places(signals)
    node = config.node_name(signals)
    try:
        return _initialise(where, node, disk, local_key=signals.signing.key_id == "local")
    except PermissionError as e:
        raise NotPermitted(
            f"{e.filename or where.evidence}: {e.strerror}",
            hint=f"run as root, or give this user {where.evidence} and {where.state}",
        ) from None
    except OSError as e:
        raise ConfigError(
            f"{e.filename or where.evidence}: {e.strerror}",
            hint="both signals.output_directory and signals.state_directory must be usable directories",
        ) from None


@contextlib.contextmanager
def signer_lock(where: Places) -> Iterator[None]:
    """Hold the signer's lock for the block: no signer writes meanwhile.  Raises `TryAgain` when one has it."""
    with (where.state / SIGNER_LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(
                f"a signer writes to {where.evidence}", hint="stop the node first: stella signals stop"
            ) from None
        yield


def _initialise(where: Places, node: str, disk: Disk, *, local_key: bool) -> Initialised:
    if (begun := reset.pending(where.state)) is None:
        return _make(where, node, disk, None, local_key=local_key)
    with signer_lock(where):
        reset.move_aside(where.evidence, where.state, begun, disk)
        made = _make(where, node, disk, begun.predecessor, local_key=local_key)
        reset.finish(where.state, disk)
    return made


def _check_readable(where: Places) -> None:
    """Raise `ConfigError` naming every document that is damaged, each with its fix."""
    damaged: list[StellaError] = []
    for read in (
        lambda: read_chain(where.evidence),
        lambda: read_head(where),
        lambda: keys.load_trusted(where.state),
    ):
        try:
            read()
        except ConfigError as e:
            damaged.append(e)
    if damaged:
        raise ConfigError(
            "\n".join(str(e) for e in damaged),
            hint="\n".join(e.hint for e in damaged),
            runbook="emergency-clear-corrupted-state",
        )


def _make(where: Places, node: str, disk: Disk, left: Predecessor | None, *, local_key: bool) -> Initialised:
    """Make what is missing.  `left` is what a reset says of the chain before, when a new one must be made."""
    for directory, mode in (
        (where.state, 0o700),
        (where.state / "keys", 0o700),
        (where.notes, 0o700),
        (where.evidence, 0o750),
        (where.evidence / names.KEYS, 0o750),
    ):
        if not directory.is_dir():
            directory.mkdir(mode=mode, parents=True)
            disk.sync_directory(directory.parent)
    _check_readable(where)
    chain = read_chain(where.evidence)
    chunks = sorted(name for name in _names(where.evidence) if names.parse_chunk_file(name))
    if chain is None and chunks:
        raise ConfigError(
            f"{where.evidence} holds chunks ({chunks[0]} …) but no {names.CHAIN}",
            hint=f"restore {names.CHAIN} from a backup, or begin a new chain: stella signals reset-chain --confirm",
            runbook="emergency-clear-corrupted-state",
        )
    if chain is not None and chain.node != node:
        raise ConfigError(
            f"{where.evidence} is the evidence of node {chain.node!r}, this is {node!r}",
            hint=f"set signals.node to {chain.node}, or choose another signals.output_directory",
        )
    # A key that is somewhere else is made known by the signer, when it first reaches it.
    key_id, new_key = _key(where, disk, has_chunks=bool(chunks)) if local_key else ("", False)
    new_chain = chain is None
    if chain is None:
        head = read_head(where)
        emptied = "the evidence directory was emptied"
        predecessor = left or (Predecessor(head.chain_id, head.index, head.statement_sha256, emptied) if head else None)
        chain = Chain(FORMAT, secrets.token_hex(16), node, clock.utc_text(time.time_ns()), predecessor)
        disk.put(where.evidence / names.CHAIN, canonical.dumps(chain))
    return Initialised(
        chain.chain_id, node, key_id, str(where.evidence), str(where.state), new_chain, new_key, chain.predecessor
    )


def _key(where: Places, disk: Disk, *, has_chunks: bool) -> tuple[str, bool]:
    """Make sure of key, public key and trust, in this order, so that a crash in between is completed next time."""
    new = False
    try:
        key = keys.load_local_key(where.state)
    except NotFound:
        if has_chunks:
            raise ConfigError(
                f"{where.evidence} holds chunks, but the key that signs them is gone",
                hint=f"restore {where.state / 'keys' / keys.SIGNING_KEY} from a backup, or begin a new chain, which "
                "names this one as its predecessor: stella signals reset-chain --confirm",
            ) from None
        key, new = keys.create_local_key(where.state, disk), True
    return trust_key(where, key.public_key(), disk), new


def trust_key(where: Places, key: ec.EllipticCurvePublicKey, disk: Disk | None = None) -> str:
    """Put a signer's public key into the evidence and into the list of trusted ones; return its id."""
    disk = disk or Disk()
    identity, pem = keys.key_id(key), keys.public_pem(key)
    path = where.evidence / names.KEYS / f"{identity}.pem"
    if not path.exists():
        disk.put(path, pem)
    elif path.read_bytes() != pem:
        raise ConfigError(f"{path} is not the key of that name", hint="remove it and run: stella signals init")
    trusted = keys.load_trust(where.state)
    if identity not in {listed.key_id for listed in trusted.keys}:
        added = keys.TrustedKey(identity, keys.ALGORITHM, clock.utc_text(time.time_ns()))
        keys.save_trust(where.state, msgspec.structs.replace(trusted, keys=[*trusted.keys, added]), disk)
    return identity


def trust_identity(where: Places, who: Identity, disk: Disk | None = None) -> None:
    """Put a keyless signer's identity into the list of trusted ones."""
    trusted = keys.load_trust(where.state)
    if (who.subject, who.issuer) not in {(listed.subject, listed.issuer) for listed in trusted.identities}:
        added = keys.TrustedIdentity(who.subject, who.issuer, clock.utc_text(time.time_ns()))
        keys.save_trust(where.state, msgspec.structs.replace(trusted, identities=[*trusted.identities, added]), disk)


def _names(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if not entry.name.endswith(TMP_SUFFIX)]


def read_chain(evidence: Path) -> Chain | None:
    """Return the chain of a directory, or None when there is no chain.json.  Raises `ConfigError`."""
    path = evidence / names.CHAIN
    try:
        chain = canonical.loads(path.read_bytes(), Chain)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(
            f"{path}: {e}", hint="restore it from a backup, or begin a new chain: stella signals reset-chain --confirm"
        ) from None
    if chain.format != FORMAT:
        raise ConfigError(f"{path} is of format {chain.format}, this release writes {FORMAT}")
    return chain


def read_head(where: Places) -> Head | None:
    """Return what head.json says, or None when there is none.  Raises `ConfigError` when it is damaged."""
    try:
        return canonical.loads(where.head.read_bytes(), Head)
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise ConfigError(
            f"{where.head}: {e}",
            hint=f"mv {where.head} {where.head}.corrupt: with the evidence in place the signer makes it anew; "
            "without, the new chain cannot name its predecessor",
        ) from None
