"""The transparency log's door: Rekor v1 and v2 behind one shape.

    submit(envelope, verifier) → the entry with its proof, also when it was there before (409)
    consistency(old, new)      → the proof that one tree is the beginning of the other

Replies are hostile: they are taken apart here, and proved by `transparency` before anybody believes them.
"""

from __future__ import annotations

import base64
from hashlib import sha256
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import anyio
import msgspec

from stella_shared.evidence.merkle import node
from stella_shared.evidence.transparency import checkpoint as notes
from stella_shared.evidence.transparency import entry as entries
from stella_shared.evidence.transparency.bundle import (
    CheckpointText,
    InclusionPromise,
    InclusionProof,
    KindVersion,
    LogId,
    TlogEntry,
)
from stella_shared.evidence.transparency.checkpoint import Checkpoint
from stella_shared.evidence.transparency.entry import Verifier
from stella_shared.evidence.transparency.trust import Log
from stella_signer.outside import Answer, Later, Outside, Refused

_JSON: Final = "application/json"
#: Rekor v2 answers once the entry is in a checkpoint; a duplicate's has to be waited for here.
_CHECKPOINT_TRIES: Final = 20
_TILE: Final = 256


class RekorLog(Protocol):
    """One log."""

    async def submit(self, envelope: bytes, verifier: Verifier) -> TlogEntry:
        """Return the log's entry of the envelope.  Raises `Later`, `Frozen` or `Refused`."""

    async def consistency(self, old: Checkpoint, new: Checkpoint) -> list[bytes]:
        """Return the proof that the tree of `new` begins with that of `old`.  Raises as `submit`."""


# -- v1 ------------------------------------------------------------------------------------------------


class _ProofV1(msgspec.Struct, frozen=True, rename="camel"):
    checkpoint: str
    log_index: int
    root_hash: str
    tree_size: int
    hashes: list[str]


class _VerificationV1(msgspec.Struct, frozen=True, rename="camel"):
    inclusion_proof: _ProofV1
    signed_entry_timestamp: str


class _EntryV1(msgspec.Struct, frozen=True):
    body: str
    integrated_time: int = msgspec.field(name="integratedTime")
    log_id: str = msgspec.field(name="logID")
    log_index: int = msgspec.field(name="logIndex")
    verification: _VerificationV1


class _ConsistencyV1(msgspec.Struct, frozen=True):
    hashes: list[str]


class RekorV1:
    """Rekor v1: JSON, with its own signed time in each entry."""

    def __init__(self, outside: Outside, url: str) -> None:
        self._outside = outside
        self._url = url.rstrip("/")

    async def submit(self, envelope: bytes, verifier: Verifier) -> TlogEntry:
        """Propose a `dsse 0.0.1` entry of the envelope's exact bytes."""
        proposed = {
            "apiVersion": entries.V1[1],
            "kind": entries.V1[0],
            "spec": {
                "proposedContent": {
                    "envelope": envelope.decode(),
                    "verifiers": [base64.b64encode(verifier.pem).decode()],
                }
            },
        }
        answer = await self._outside.post(
            f"{self._url}/api/v1/log/entries", msgspec.json.encode(proposed), _JSON, Accept=_JSON
        )
        if answer.status == 409:
            # It is there already: whatever the Location's host, the entry is asked of the log we know.
            uuid = urlsplit(answer.headers.get("location", "")).path.rpartition("/")[2]
            if not uuid or not set(uuid) <= set("0123456789abcdef"):
                raise Later("the log has this entry already, and does not say where")
            answer = await self._outside.get(f"{self._url}/api/v1/log/entries/{uuid}")
        return _from_v1(answer)

    async def consistency(self, old: Checkpoint, new: Checkpoint) -> list[bytes]:
        """Ask the log for the proof."""
        if old.size in (0, new.size):
            return []
        query = f"firstSize={old.size}&lastSize={new.size}"
        tree_id = new.origin.rpartition(" - ")[2]
        if tree_id.isdigit():
            query += f"&treeID={tree_id}"
        answer = await self._outside.get(f"{self._url}/api/v1/log/proof?{query}")
        return [_hex(text) for text in _decoded(answer, _ConsistencyV1).hashes]


def _decoded(answer: Answer, kind: Any) -> Any:
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise Later(f"the log's reply is malformed: {e}") from None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Later("the log's reply holds a hash that is none") from None


def _from_v1(answer: Answer) -> TlogEntry:
    found: dict[str, _EntryV1] = _decoded(answer, dict[str, _EntryV1])
    if len(found) != 1:
        raise Later(f"the log's reply holds {len(found)} entries")
    entry = next(iter(found.values()))
    proof = entry.verification.inclusion_proof

    def b64(text: str) -> str:
        return base64.b64encode(_hex(text)).decode()

    return TlogEntry(
        log_index=str(entry.log_index),
        log_id=LogId(b64(entry.log_id)),
        kind_version=KindVersion(*entries.V1),
        inclusion_proof=InclusionProof(
            str(proof.log_index),
            b64(proof.root_hash),
            str(proof.tree_size),
            [b64(text) for text in proof.hashes],
            CheckpointText(proof.checkpoint),
        ),
        canonicalized_body=entry.body,
        integrated_time=str(entry.integrated_time),
        inclusion_promise=InclusionPromise(entry.verification.signed_entry_timestamp),
    )


# -- v2 ------------------------------------------------------------------------------------------------


class _TlogReply(msgspec.Struct, frozen=True, rename="camel"):
    """A TransparencyLogEntry as a log sends it: what it leaves out or writes as null is put right here."""

    log_index: str | int
    log_id: LogId
    kind_version: KindVersion
    canonicalized_body: str
    inclusion_proof: dict[str, Any]


class RekorV2:
    """Rekor v2: written to at one URL, read as tiles (C2SP tlog-tiles), maybe at another."""

    def __init__(self, outside: Outside, url: str, read_url: str, log: Log) -> None:
        self._outside = outside
        self._url = url.rstrip("/")
        self._read_url = read_url.rstrip("/") or f"{self._url}/api/v2"
        self._log = log

    async def submit(self, envelope: bytes, verifier: Verifier) -> TlogEntry:
        """Log a `hashedrekord 0.0.2` entry of the envelope."""
        request = {"hashedRekordRequestV002": entries.hashedrekord(envelope, verifier)}
        answer = await self._outside.post(
            f"{self._url}/api/v2/log/entries", msgspec.json.encode(request), _JSON, Accept=_JSON
        )
        if answer.status != 409:
            return _from_v2(answer)
        index = answer.headers.get("x-log-index", "")
        if not index.isdigit():
            raise Later("the log has this entry already, and does not say where")
        return await self._rebuilt(int(index), entries.body_v2(envelope, verifier))

    async def _rebuilt(self, index: int, body: bytes) -> TlogEntry:
        """Return the entry that stands at `index`, with a proof made from the log's tiles."""
        for _ in range(_CHECKPOINT_TRIES):
            text = (await self._outside.get(f"{self._read_url}/checkpoint")).body.decode("utf-8", "replace")
            signed = _checked(text, self._log)
            if signed.size > index:
                break
            await anyio.sleep(1.0)
        else:
            raise Later(f"entry {index} is in no checkpoint yet")
        tiles = Tiles(self._outside, self._read_url, signed.size)
        path = await tiles.inclusion(index)
        return TlogEntry(
            log_index=str(index),
            log_id=LogId(base64.b64encode(_note_id(self._log)).decode()),
            kind_version=KindVersion(*entries.V2),
            inclusion_proof=InclusionProof(
                str(index),
                base64.b64encode(signed.root).decode(),
                str(signed.size),
                [base64.b64encode(item).decode() for item in path],
                CheckpointText(text),
            ),
            canonicalized_body=base64.b64encode(body).decode(),
        )

    async def consistency(self, old: Checkpoint, new: Checkpoint) -> list[bytes]:
        """Make the proof from the log's tiles."""
        if old.size in (0, new.size):
            return []
        return await Tiles(self._outside, self._read_url, new.size).consistency(old.size)


def _checked(text: str, log: Log) -> Checkpoint:
    try:
        signed = notes.parse(text)
        notes.check_signature(signed, log)
    except ValueError as e:
        raise Later(str(e)) from None
    return signed


def _note_id(log: Log) -> bytes:
    """Return the id under which entries name the log: C2SP's for Ed25519 (it is the one that is not the SPKI's)."""
    from cryptography.hazmat.primitives.asymmetric import ed25519

    if isinstance(log.key, ed25519.Ed25519PublicKey):
        return sha256(log.name.encode() + b"\n\x01" + log.key.public_bytes_raw()).digest()
    return min(log.ids)


def _from_v2(answer: Answer) -> TlogEntry:
    reply: _TlogReply = _decoded(answer, _TlogReply)
    proof = reply.inclusion_proof
    try:
        return TlogEntry(
            log_index=str(reply.log_index),
            log_id=reply.log_id,
            kind_version=reply.kind_version,
            inclusion_proof=InclusionProof(
                str(proof.get("logIndex", "0")),
                str(proof["rootHash"]),
                str(proof["treeSize"]),
                [str(item) for item in proof.get("hashes") or []],
                CheckpointText(str(proof["checkpoint"]["envelope"])),
            ),
            canonicalized_body=reply.canonicalized_body,
        )
    except (KeyError, TypeError) as e:
        raise Later(f"the log's reply is malformed: {e}") from None


class Tiles:
    """Proofs out of a log's tiles, for its tree of `size` leaves.

    Node (level, i) covers the leaves [i·2^level, (i+1)·2^level).
    """

    def __init__(self, outside: Outside, url: str, size: int) -> None:
        self._outside = outside
        self._url = url
        self._size = size
        self._kept: dict[tuple[int, int], bytes] = {}

    async def inclusion(self, index: int) -> list[bytes]:
        """Return the inclusion proof of leaf `index` (RFC 9162 2.1.3.1)."""
        path: list[bytes] = []
        low, high = 0, self._size
        while high - low > 1:
            split = low + _split(high - low)
            if index < split:
                path.append(await self._root(split, high))
                high = split
            else:
                path.append(await self._root(low, split))
                low = split
        return path[::-1]

    async def consistency(self, old_size: int) -> list[bytes]:
        """Return the consistency proof from the tree of `old_size` leaves (RFC 9162 2.1.4.1)."""
        path: list[bytes] = []
        low, high, known = 0, self._size, True
        while old_size != high:
            split = low + _split(high - low)
            if old_size <= split:
                path.append(await self._root(split, high))
                high = split
            else:
                path.append(await self._root(low, split))
                low, known = split, False
        if not known:
            path.append(await self._root(low, high))
        return path[::-1]

    async def _root(self, low: int, high: int) -> bytes:
        """Return the root over leaves [low, high), as the tree cuts it."""
        count = high - low
        level = count.bit_length() - 1
        if count == 1 << level and low % count == 0:
            return await self._node(level, low >> level)
        split = low + _split(count)
        return node(await self._root(low, split), await self._root(split, high))

    async def _node(self, level: int, index: int) -> bytes:
        tile_level, above = divmod(level, 8)
        if above:
            return node(await self._node(level - 1, 2 * index), await self._node(level - 1, 2 * index + 1))
        tile = await self._tile(tile_level, index // _TILE)
        offset = index % _TILE * 32
        if len(tile) < offset + 32:
            raise Later("a tile of the log is too short")
        return tile[offset : offset + 32]

    async def _tile(self, level: int, index: int) -> bytes:
        if (level, index) not in self._kept:
            width = min(_TILE, (self._size >> (8 * level)) - index * _TILE)
            partial = f".p/{width}" if width < _TILE else ""
            answer = await self._outside.get(f"{self._url}/tile/{level}/{_tile_name(index)}{partial}")
            self._kept[level, index] = answer.body
        return self._kept[level, index]


def _split(count: int) -> int:
    """Return the largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)


def _tile_name(index: int) -> str:
    """Return C2SP's path of a tile index: groups of three digits, all but the last behind an `x`."""
    name = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        name = f"x{index % 1000:03d}/{name}"
    return name


def connect(outside: Outside, url: str, version: int, read_url: str, logs: list[Log]) -> RekorLog:
    """Return the door of the log at `url`.  Raises `Refused` when the trusted root does not know it."""
    name = url.partition("://")[2].rstrip("/")
    known = [log for log in logs if log.name == name]
    if not known:
        raise Refused(f"the trusted root knows no log at {url}")
    if version == 1:
        return RekorV1(outside, url)
    from cryptography.hazmat.primitives.asymmetric import ed25519

    newest = [log for log in known if isinstance(log.key, ed25519.Ed25519PublicKey)] or known
    return RekorV2(outside, url, read_url, newest[-1])
