"""The names of the files in an evidence directory, both ways."""

from __future__ import annotations

import re

import msgspec

CHAIN = "chain.json"
KEYS = "keys"
#: The lines: zstd frames of NDJSON (`compressed`).
DATA = "ndjson.zst"
LEDGER = "ledger.json"
ENVELOPE = "dsse.json"
#: Beside a signed chunk there may be its Sigstore bundle, its timestamps and its certificate.
BUNDLE = "sigstore.json"
STAMPS = "stamps.json"
CERTIFICATE = "cert.pem"
#: An export's signed manifest; a directory that exports were joined in holds several.
MANIFEST = "manifest.dsse.json"
OPEN_DATA = "open.ndjson.zst"
OPEN_JOURNAL = "open.journal"
PROOFS = (BUNDLE, STAMPS, CERTIFICATE)
KINDS = (DATA, LEDGER, ENVELOPE, *PROOFS, OPEN_DATA, OPEN_JOURNAL)
#: What a closed chunk may consist of.
CLOSED = (DATA, LEDGER, ENVELOPE, *PROOFS)
FIRST_INDEX = 1

_CHUNK = re.compile(rf"([0-9]{{6,12}})\.({'|'.join(map(re.escape, KINDS))})")
_MANIFEST = re.compile(r"manifest(-[0-9a-f]{16})?\.dsse\.json")
_KEY = re.compile(r"([0-9a-f]{64})\.pem")


class ChunkFile(msgspec.Struct, frozen=True):
    """A file of a chunk: which chunk, which of `KINDS`."""

    index: int
    kind: str


def chunk_file(index: int, kind: str) -> str:
    """Return the file name of chunk `index` of one of `KINDS`: six digits at least."""
    return f"{index:06d}.{kind}"


def parse_chunk_file(name: str) -> ChunkFile | None:
    """Return what `name` is, or None when no chunk has a file of that name."""
    match = _CHUNK.fullmatch(name)
    if match is None or int(match[1]) < FIRST_INDEX or chunk_file(int(match[1]), match[2]) != name:
        return None
    return ChunkFile(int(match[1]), match[2])


def parse_key_file(name: str) -> str | None:
    """Return the key id that `name` (in `keys/`) stands for, or None."""
    match = _KEY.fullmatch(name)
    return match[1] if match else None


def is_manifest(name: str) -> bool:
    """Return whether `name` is that of an export's manifest."""
    return _MANIFEST.fullmatch(name) is not None


def further_manifest(sha256: str) -> str:
    """Return the name of a manifest that joins another one's evidence; `sha256` is that of its file."""
    return f"manifest-{sha256[:16]}.dsse.json"
