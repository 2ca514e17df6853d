"""Notes: what an operator did to a chain, told in the chain itself.

    state_directory/notes/<id>.json   a note that waits (a command wrote it)
    NNNNNN.ledger.json, member notes  a note that is recorded (the signer put it there)

The statement names the ledger's digest, so a recorded note is signed.  The signer takes every waiting note
into the ledger of the chunk that it closes next, and removes the files once that ledger is durable.  A crash
in between leaves a note in both places; the next start knows it by its id and records it once.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from stella_shared import clock
from stella_shared.errors import UsageError
from stella_shared.evidence import canonical, names
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.records import Ledger, Note
from stella_shared.evidence.store import Places

CLEANUP: Final = "cleanup"
PLANNED_GAP: Final = "planned_gap"
#: Notes of these kinds are waited for: the signer closes the open chunk at once to record them.
URGENT: Final = frozenset({CLEANUP})
MAX_TEXT: Final = 200
#: A ledger holds at most so many notes; more wait for the next chunk.
MAX_NOTES: Final = 64

_MAX_FILE_BYTES: Final = 4096
# The directory is its owner's alone; a command that runs as root must leave the signer something to read.
_FILE_MODE: Final = 0o644
_ID: Final = re.compile(r"[0-9a-f]{32}")
_KIND: Final = re.compile(r"[a-z][a-z_]{0,31}")
_NAME: Final = re.compile(r"([0-9a-f]{32})\.json")


class Waiting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of a note's file in the state directory.  It counts for the chain it names and no other."""

    chain_id: str
    note: Note


def plain(text: str, what: str = "--reason") -> str:
    """Return `text` without space around it.  Raises `UsageError` when it is too long, or not printable."""
    text = text.strip()
    if len(text) > MAX_TEXT or not text.isprintable():
        raise UsageError(f"{what} must be one line of printable text, {MAX_TEXT} characters at most")
    return text


def make(kind: str, *, first: int = 0, last: int = 0, text: str = "") -> Note:
    """Return a new note, now.  `first` and `last` are the chunks it speaks of, 0 for none."""
    return Note(secrets.token_hex(16), kind, clock.utc_text(time.time_ns()), first, last, text)


def form_faults(ledger: Ledger) -> list[str]:
    """Return, in words, what is wrong with the form of a ledger's notes; [] when nothing is."""
    faults = [f"{len(ledger.notes)} notes, {MAX_NOTES} are allowed"] if len(ledger.notes) > MAX_NOTES else []
    if len({note.id for note in ledger.notes}) != len(ledger.notes):
        faults.append("a note is there twice")
    faults += [f"note {note.id[:32]!r} is not of the form of a note" for note in ledger.notes if not _well_formed(note)]
    return faults


def _well_formed(note: Note) -> bool:
    text = len(note.text) <= MAX_TEXT and note.text.isprintable()
    span = 0 <= note.first <= note.last and (note.first > 0 or note.last == 0)
    return bool(_ID.fullmatch(note.id) and _KIND.fullmatch(note.kind) and len(note.at) <= 40 and text and span)


# -- waiting ---------------------------------------------------------------------------------------------------


def file_of(where: Places, note_id: str) -> Path:
    """Return where a waiting note stands."""
    return where.notes / f"{note_id}.json"


def put(where: Places, chain_id: str, note: Note, disk: Disk | None = None) -> None:
    """Leave a note for the signer, durably."""
    disk = disk or Disk()
    if not where.notes.is_dir():
        where.notes.mkdir(mode=0o700)
        disk.sync_directory(where.state)
    disk.put(file_of(where, note.id), canonical.dumps(Waiting(chain_id, note)), _FILE_MODE)


def waiting(where: Places, chain_id: str) -> list[Note]:
    """Return the notes that wait for a chain, the oldest first.  Files that hold no note of it are passed over."""
    found = []
    for path in _files(where):
        try:
            with path.open("rb") as file:
                told = canonical.loads(file.read(_MAX_FILE_BYTES), Waiting)
        except (OSError, ValueError):
            continue
        if told.chain_id == chain_id and path == file_of(where, told.note.id) and _well_formed(told.note):
            found.append(told.note)
    return sorted(found, key=lambda note: (note.at, note.id))


def _files(where: Places) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from (path for path in where.notes.iterdir() if _NAME.fullmatch(path.name))


def drop(where: Places, ids: Iterable[str], disk: Disk) -> None:
    """Remove the files of notes that are recorded.  The names are gone for good when this returns."""
    paths = [path for note_id in ids if (path := file_of(where, note_id)).exists()]
    for path in paths:
        disk.remove(path)
    if paths:
        # A file that came back after a power cut would be recorded again by a later chunk.
        disk.sync_directory(where.notes)


# -- recorded --------------------------------------------------------------------------------------------------


class _OnlyNotes(msgspec.Struct, frozen=True):
    """A ledger, read for its notes alone: a chain may have very many ledgers."""

    notes: list[Note]


def recorded(where: Places, index: int) -> list[Note]:
    """Return the notes of a closed chunk.  Raises `ValueError` for a file that is no ledger."""
    try:
        return msgspec.json.decode(where.chunk(index, names.LEDGER).read_bytes(), type=_OnlyNotes).notes
    except (msgspec.MsgspecError, RecursionError) as e:
        raise ValueError(str(e)) from None


def unaccounted(where: Places, bare: set[int], closed: list[int]) -> set[int]:
    """Return those of the chunks `bare` that no cleanup noted in one of the chunks `closed` accounts for.

    Raises `ValueError` for a ledger that is none.  The newest are read first: there the notes are.
    """
    left = set(bare)
    for index in sorted(closed, reverse=True):
        if not left:
            break
        left -= covered(left, [(index, note) for note in recorded(where, index)])
    return left


def covered(bare: set[int], told: Iterable[tuple[int, Note]]) -> set[int]:
    """Return those of the chunks `bare` that a `cleanup` note of a later chunk accounts for.

    `told` are (chunk, note).
    """
    spans = [(index, note) for index, note in told if note.kind == CLEANUP]
    return {b for b in bare if any(note.first <= b <= note.last and b < index for index, note in spans)}
