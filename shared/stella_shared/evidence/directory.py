"""What lies in an evidence directory: names, keys, chunks' files.  Anything that no signer puts there is a fault.

A signer may be at work meanwhile: what it renames or closes between two looks does no harm.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.evidence import keys, names
from stella_shared.evidence.disk import TMP_SUFFIX
from stella_shared.evidence.report import Fault, OpenChunk, Warning
from stella_shared.evidence.vouching import form_code

MAX_JSON_BYTES: Final = 64 << 20
_IGNORED_DIRECTORIES: Final = frozenset({"lost+found"})
_LISTING_TRIES: Final = 5


class Directory(msgspec.Struct):
    """A look at an evidence directory.  `listing` is name → `file`, `directory`, or `other` (links too).

    `kinds` are the closed chunks' files, `opened` is the open chunk.  A node's `own` directory is whole, so that a
    manifest in it is a fault.
    """

    path: Path
    own: bool = False
    listing: dict[str, str] = {}
    kinds: dict[int, set[str]] = {}
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    opened: OpenChunk | None = None
    faults: list[Fault] = []
    warnings: list[Warning] = []

    def look(self) -> None:
        """Read names and public keys; what is wrong with them stands in `faults` and `warnings`."""
        self.listing = _stable(self.path)
        self._read_keys()
        self._chunk_files()
        self._open_chunk()

    def manifests(self) -> list[str]:
        """Return the names of the manifests of exports."""
        return [n for n, kind in self.listing.items() if kind == "file" and names.is_manifest(n) and not self.own]

    def _fault(self, code: str, chunk: int | None, message: str) -> None:
        self.faults.append(Fault(code, chunk, message))

    def _read_keys(self) -> None:
        directory = self.path / names.KEYS
        if self.listing.get(names.KEYS) != "directory":
            self._fault("missing", None, f"the directory {names.KEYS} is missing")
            return
        for name, kind in _look(directory).items():
            shown = f"{names.KEYS}/{name}"
            identity = names.parse_key_file(name)
            if identity is None or kind != "file":
                if not self._left_over(name, names.parse_key_file(name.removesuffix(TMP_SUFFIX)), shown):
                    self._fault("inserted", None, f"{shown} is no public key's name")
                continue
            try:
                key = keys.load_public(read(directory / name))
            except ValueError as e:
                self._fault(form_code(e), None, f"{shown}: {e}")
                continue
            if keys.key_id(key) != identity:
                self._fault("edited", None, f"{shown} holds another key")
                continue
            self.keys[identity] = key

    def _left_over(self, name: str, meant: object, shown: str) -> bool:
        """Return whether `name` is the temporary form of a file we know: a crash leaves such, and nobody reads it."""
        if not name.endswith(TMP_SUFFIX) or meant is None:
            return False
        self.warnings.append(
            Warning("left_over", None, f"{shown} was being written when something died; it means nothing")
        )
        return True

    def _chunk_files(self) -> None:
        for name, kind in self.listing.items():
            file = names.parse_chunk_file(name)
            if file is not None and kind == "file":
                self.kinds.setdefault(file.index, set()).add(file.kind)
            elif names.is_manifest(name) and kind == "file" and not self.own:
                pass
            elif name not in (names.CHAIN, names.KEYS) and not (kind == "directory" and name in _IGNORED_DIRECTORIES):
                base = name.removesuffix(TMP_SUFFIX)
                if not self._left_over(name, names.parse_chunk_file(base) or (base == names.CHAIN or None), name):
                    self._fault("inserted", None, f"{name} is no file of an evidence directory")

    def _open_chunk(self) -> None:
        """Take the open chunk out of `kinds`, and refuse open files that stand anywhere but at the end."""
        last = max(self.kinds, default=0)
        for index in sorted(self.kinds):
            files = self.kinds[index]
            if names.OPEN_DATA in files and index == last and not files & {names.DATA, names.ENVELOPE}:
                # Its ledger may be there already, when the signer is just closing it, or died doing so.
                files.clear()
                with contextlib.suppress(FileNotFoundError):  # closed since the listing
                    size = (self.path / names.chunk_file(index, names.OPEN_DATA)).stat().st_size
                    self.opened = OpenChunk(index, size)
            elif names.OPEN_DATA in files:
                self._fault("inserted", index, f"{names.chunk_file(index, names.OPEN_DATA)} is not at the end")
            elif names.OPEN_JOURNAL in files and index != last:
                self._fault("inserted", index, f"{names.chunk_file(index, names.OPEN_JOURNAL)} is not at the end")
            files -= {names.OPEN_DATA, names.OPEN_JOURNAL}
            if not files:
                del self.kinds[index]


def _stable(directory: Path) -> dict[str, str]:
    """Return the names, looking until two looks agree: a rename under way may hide a file from a single one."""
    seen = _look(directory)
    for _ in range(_LISTING_TRIES):
        again = _look(directory)
        if again == seen:
            break
        seen = again
    return seen


def _look(directory: Path) -> dict[str, str]:
    """Return the names in a directory, sorted, with what each is."""
    with os.scandir(directory) as entries:
        found = {
            entry.name: "file"
            if entry.is_file(follow_symlinks=False)
            else "directory"
            if entry.is_dir(follow_symlinks=False)
            else "other"
            for entry in entries
        }
    return dict(sorted(found.items()))


def read(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return a file's bytes.  Raises `ValueError` when it is no regular file, or longer than `limit`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return data
