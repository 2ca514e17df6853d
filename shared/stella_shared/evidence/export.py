"""Cutting a part out of a chain: which chunks, which files, the manifest over them, and the archive.

    span of time → chunks whose window overlaps → files → digests → Manifest → signature → .tar.gz

The same chunks of the same chain give the same bytes: names are sorted, times, owners and modes are fixed.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from stella_shared import clock
from stella_shared.errors import BadAnswer, ConfigError, NotFound, TryAgain, UsageError
from stella_shared.evidence import archive, dsse, manifest, names, notes, statement
from stella_shared.evidence.lines import blocks
from stella_shared.evidence.manifest import Anchor, End, Manifest, Predicate
from stella_shared.evidence.records import FORMAT
from stella_shared.evidence.store import Places, read_chain

#: The folder in the archive that holds the evidence.
FOLDER: Final = "evidence"
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_UTC: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{9}Z")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Times(msgspec.Struct, frozen=True):
    """Which time is asked for: from `since` on, before `until`; UTC as text, "" for no bound."""

    since: str = ""
    until: str = ""


def check_times(asked: Times) -> None:
    """Raise `UsageError` unless both bounds are of the form that `times` gives."""
    for text in (asked.since, asked.until):
        if text and not _UTC.fullmatch(text):
            raise UsageError(f"{text!r} is no time in UTC with nine fractional digits")


def times(start: str, end: str) -> Times:
    """Return the bounds that days (inclusive, UTC) or RFC 3339 times (inclusive) stand for; "" for none.

    Raises `UsageError` for text that is neither, and for an end before the start.
    """
    found = Times(_instant(start, "--from", after=False), _instant(end, "--to", after=True))
    if found.since and found.until and found.since >= found.until:
        raise UsageError(f"--to {end} is before --from {start}")
    return found


def _instant(text: str, option: str, *, after: bool) -> str:
    """Return the first instant of a day or a time; with `after`, the first one behind it."""
    if not text:
        return ""
    try:
        if _DAY.fullmatch(text):
            at = datetime.fromisoformat(text).replace(tzinfo=UTC) + timedelta(days=after)
            extra_ns = 0
        else:
            at = datetime.fromisoformat(text)
            extra_ns = int(after)
        if at.tzinfo is None:
            raise ValueError("no offset from UTC")
        since = at - _EPOCH
        ns = (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000 + extra_ns
        return clock.utc_text(ns)
    except (ValueError, OverflowError) as e:
        raise UsageError(
            f"{option} {text!r} is neither a day nor an RFC 3339 time: {e}",
            hint="2026-01-31, or 2026-01-31T12:00:00Z",
        ) from None


class _Window(msgspec.Struct, frozen=True):
    start: str
    end: str


class _OnlyWindow(msgspec.Struct, frozen=True):
    window: _Window


def _window(where: Places, index: int) -> _Window:
    path = where.chunk(index, names.LEDGER)
    try:
        return msgspec.json.decode(path.read_bytes(), type=_OnlyWindow).window
    except (msgspec.MsgspecError, RecursionError, FileNotFoundError) as e:
        raise ConfigError(f"{path}: {e}", hint=f"stella signals verify-chain {where.evidence}") from None


def build(where: Places, asked: Times, *, proofs: bool) -> Manifest:
    """Return the manifest of the signed chunks whose window overlaps the time asked for.

    Chunks between two that overlap are in it whatever their clock said, so that it is one piece.  With
    `proofs`, bundles and timestamps are in it too; certificates always are.  Raises `NotFound` when no chunk
    overlaps, and `ConfigError` for evidence that is not whole.
    """
    chain = read_chain(where.evidence)
    if chain is None:
        raise NotFound(f"{where.evidence} holds no chain", hint="run: stella signals init")
    files: dict[int, set[str]] = {}
    for path in where.evidence.iterdir():
        if file := names.parse_chunk_file(path.name):
            files.setdefault(file.index, set()).add(file.kind)
    signed = sorted(index for index, kinds in files.items() if names.ENVELOPE in kinds)
    matching = [index for index in signed if _overlaps(_window(where, index), asked)]
    if not matching:
        raise NotFound(
            f"no signed chunk of {where.evidence} was open in that time",
            hint=f"stella signals verify-chain {where.evidence} --verbose shows when each chunk was open",
        )
    first, last, newest = matching[0], matching[-1], signed[-1]
    anchor = first - 1 if first > names.FIRST_INDEX else 0
    span = range(first, last + 1)
    archived = {index for index in span if names.DATA not in files.get(index, set())}
    try:
        lost = notes.unaccounted(where, archived, signed)
    except ValueError as e:
        raise ConfigError(f"a ledger in {where.evidence}: {e}") from None
    if lost:
        raise ConfigError(f"{where.chunk(min(lost), names.DATA)} is missing, and no cleanup of it is noted")
    listed = [names.CHAIN]
    keys = (where.evidence / names.KEYS).iterdir()
    listed += [f"{names.KEYS}/{path.name}" for path in keys if names.parse_key_file(path.name)]
    wanted = {names.DATA, names.LEDGER, names.ENVELOPE} | (set(names.PROOFS) if proofs else set())
    for index in span:
        here = files.get(index, set())
        # A keyless signature is nothing without its certificate, and that is nothing without its time.
        keyless = {names.CERTIFICATE, names.STAMPS} if names.CERTIFICATE in here else set()
        listed += [names.chunk_file(index, kind) for kind in sorted((wanted | keyless) & here)]
    anchored = (names.LEDGER, names.ENVELOPE, names.CERTIFICATE, names.STAMPS)
    listed += [names.chunk_file(anchor, kind) for kind in anchored if kind in files.get(anchor, set())]
    digests = {name: _digest(where.evidence / name) for name in listed}
    stated = _end(where, newest)
    return manifest.build(
        digests,
        Predicate(
            FORMAT,
            chain.chain_id,
            chain.node,
            first,
            last,
            Anchor(anchor, digests[names.chunk_file(anchor, names.LEDGER)], _end(where, anchor).statement_sha256)
            if anchor
            else None,
            stated,
            [index for index in span if names.BUNDLE not in files[index]],
            sorted(archived),
            asked.since,
            asked.until,
            _window(where, newest).end,
        ),
    )


def _overlaps(window: _Window, asked: Times) -> bool:
    return (not asked.since or window.end >= asked.since) and (not asked.until or window.start < asked.until)


def _end(where: Places, index: int) -> End:
    path = where.chunk(index, names.ENVELOPE)
    try:
        payload = dsse.open_envelope(path.read_bytes()).payload
        digest = statement.decode(payload).subject[0].digest.get("sha256", "")
    except (ValueError, FileNotFoundError) as e:
        raise ConfigError(f"{path}: {e}", hint=f"stella signals verify-chain {where.evidence}") from None
    return End(index, sha256(payload).hexdigest(), digest)


def _digest(path: Path) -> str:
    digest = sha256()
    try:
        for block in blocks(path):
            digest.update(block)
    except FileNotFoundError:
        raise TryAgain(
            f"{path} went away meanwhile", hint="a cleanup may have taken it: run the command again"
        ) from None
    return digest.hexdigest()


def write(
    evidence: Path, signed: bytes, out: IO[bytes], progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Write the archive of an export: the files that the signed manifest lists, and the manifest.

    Each file is digested as it is copied.  Raises `BadAnswer` when one is not what the manifest says, and
    `UsageError` when it is more than `import` would take.
    """
    listed, _ = manifest.open_signed(signed)
    digests = listed.digests()
    total = sum((evidence / name).stat().st_size for name in digests)
    if total > archive.MAX_TOTAL_BYTES:
        raise UsageError(
            f"{total} bytes are more than an archive may hold ({archive.MAX_TOTAL_BYTES})",
            hint="export shorter times one after the other: import joins them",
        )
    # Level 6, no name, no time: the header is the same ten bytes always.
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=out, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for done, name in enumerate(sorted([*digests, names.MANIFEST]), 1):
            if name == names.MANIFEST:
                _add(tar, name, len(signed), io.BytesIO(signed))
            else:
                with (evidence / name).open("rb") as file:
                    hashed = _Hashed(file)
                    _add(tar, name, (evidence / name).stat().st_size, hashed)
                if hashed.digest() != digests[name]:
                    raise BadAnswer(f"{evidence / name} changed while it was exported")
            if progress:
                progress(done, len(digests) + 1)
    return listed


def _add(tar: tarfile.TarFile, name: str, size: int, source: Any) -> None:
    member = tarfile.TarInfo(f"{FOLDER}/{name}")
    member.size = size
    member.mode = 0o644
    tar.addfile(member, source)


class _Hashed:
    """A file that is digested as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = sha256()

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Return the SHA-256 of what was read."""
        return self._hash.hexdigest()
