"""The signed manifest of an export: which part of which chain it is, and the digest of every file in it.

A DSSE envelope by the node's key over an in-toto Statement v1.  Whoever holds a part of a chain learns from it
that the part is meant: where it begins, where it ends, and how far the chain went when it was cut out.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from stella_shared.errors import BrokenPromise
from stella_shared.evidence import canonical, dsse, names
from stella_shared.evidence.dsse import Opened
from stella_shared.evidence.records import FORMAT
from stella_shared.evidence.statement import STATEMENT_TYPE, Subject

PREDICATE_TYPE: Final = "https://stella-signals.dev/evidence-export/v1"
MAX_ENVELOPE_BYTES: Final = 256 << 20
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Anchor(msgspec.Struct, frozen=True):
    """The chunk before the first: its ledger and envelope are there, its lines are not part of the export."""

    index: int
    ledger_sha256: str
    statement_sha256: str


class End(msgspec.Struct, frozen=True):
    """The newest signed chunk of the whole chain when the export was made."""

    index: int
    statement_sha256: str
    chunk_sha256: str


class Predicate(msgspec.Struct, frozen=True, rename={"since": "from", "until": "to"}):
    """The predicate of `PREDICATE_TYPE`.

    Chunks `first` to `last` are there.  `pending` of them are signed and in no log; the lines of `archived`
    ones had been cleaned up, as a signed note of the chain says.  `since` and `until` bound the time that was
    asked for, `until` excluded, "" for no bound.  `created` is the end of the newest signed chunk's window.
    """

    format: int
    chain_id: str
    node: str
    first: int
    last: int
    anchor: Anchor | None
    head: End
    pending: list[int]
    archived: list[int]
    since: str
    until: str
    created: str


class Manifest(msgspec.Struct, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}):
    """An in-toto Statement v1 whose subjects are all other files of the export, sorted by name."""

    type: str
    subject: list[Subject]
    predicate_type: str
    predicate: Predicate

    def digests(self) -> dict[str, str]:
        """Return file name → SHA-256."""
        return {subject.name: subject.digest["sha256"] for subject in self.subject}


def build(digests: dict[str, str], predicate: Predicate) -> Manifest:
    """Return the manifest over these files."""
    subjects = [Subject(name, {"sha256": digests[name]}) for name in sorted(digests)]
    return Manifest(STATEMENT_TYPE, subjects, PREDICATE_TYPE, predicate)


def encode(manifest: Manifest) -> bytes:
    """Return the RFC 8785 bytes: the DSSE payload.  Raises `BrokenPromise` for what `decode` would refuse."""
    data = canonical.dumps(manifest)
    if faults := _faults(manifest):
        raise BrokenPromise(f"a manifest that is none: {faults}")
    return data


def decode(payload: bytes) -> Manifest:
    """Parse a manifest.  Raises `ValueError` unless it is canonical and consistent in itself."""
    manifest = canonical.loads(payload, Manifest)
    if faults := _faults(manifest):
        raise ValueError(f"manifest: {faults}")
    return manifest


def open_signed(data: bytes) -> tuple[Manifest, Opened]:
    """Parse `manifest.dsse.json`.  No signature is verified yet.  Raises `ValueError`."""
    opened = dsse.open_envelope(data, MAX_ENVELOPE_BYTES)
    return decode(opened.payload), opened


def _faults(manifest: Manifest) -> str:
    """Return what is wrong with a manifest in itself, "" when nothing is."""
    predicate = manifest.predicate
    first, last = predicate.first, predicate.last
    listed = [subject.name for subject in manifest.subject]
    kinds = {name: names.parse_chunk_file(name) for name in listed}
    anchor = predicate.anchor.index if predicate.anchor else 0
    if manifest.type != STATEMENT_TYPE or manifest.predicate_type != PREDICATE_TYPE:
        return f"type {manifest.type!r} with predicate {manifest.predicate_type!r} is not ours"
    if predicate.format != FORMAT:
        return f"format {predicate.format} is not known here"
    if not names.FIRST_INDEX <= first <= last <= predicate.head.index:
        return f"chunks {first} to {last} of {predicate.head.index}"
    if anchor != (first - 1 if first > names.FIRST_INDEX else 0):
        return f"chunk {anchor} is no anchor of chunk {first}"
    if listed != sorted(set(listed)):
        return "the files are not sorted, or one is there twice"
    if any(set(s.digest) != {"sha256"} or not _DIGEST.fullmatch(s.digest["sha256"]) for s in manifest.subject):
        return "a file has no SHA-256"
    for name, file in kinds.items():
        key = name.startswith(f"{names.KEYS}/") and names.parse_key_file(name.removeprefix(f"{names.KEYS}/"))
        chunk = file is not None and file.kind in names.CLOSED and (anchor or first) <= file.index <= last
        if not (name == names.CHAIN or key or chunk):
            return f"{name!r} is no file of this export"
    if any(not first <= index <= last for index in (*predicate.pending, *predicate.archived)):
        return "a pending or archived chunk is not in the range"
    if any(found != sorted(set(found)) for found in (predicate.pending, predicate.archived)):
        return "pending or archived chunks are not sorted"
    if names.CHAIN not in kinds or last - first >= len(listed):
        return "files are missing from it"
    whole = {names.DATA, names.LEDGER, names.ENVELOPE}
    archived = set(predicate.archived)
    for index in range(anchor or first, last + 1):
        needed = whole - {names.DATA} if index == anchor or index in archived else whole
        unlike = {names.DATA} if index in archived else set()
        if not {names.chunk_file(index, kind) for kind in needed} <= kinds.keys() or any(
            names.chunk_file(index, kind) in kinds for kind in unlike
        ):
            return f"chunk {index} does not have the files it should have"
    return ""
