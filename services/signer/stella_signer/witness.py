"""The log's memory, kept by us: the largest checkpoint seen, from which each new one must be shown to grow.

A log that shows two histories is found out here, whichever of them came first.

    state_directory/checkpoints.json    {"<log>": "<checkpoint>"}: written after the proof, so never ahead of it
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import anyio
import msgspec

from stella_shared.errors import ConfigError
from stella_shared.evidence import canonical
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.transparency import checkpoint as notes
from stella_shared.evidence.transparency import tree
from stella_shared.evidence.transparency.checkpoint import Checkpoint
from stella_shared.evidence.transparency.trust import Log
from stella_signer.rekor import RekorLog

FILE: Final = "checkpoints.json"


class TwoHistories(Exception):
    """The log contradicts what it said before.  Nothing of it is believed until somebody has looked."""


class _Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    checkpoints: dict[str, str]


class Witness:
    """Remembers and compares.  One call at a time."""

    def __init__(self, state: Path, disk: Disk | None = None) -> None:
        """Read what was remembered.  Raises `ConfigError` when the file is damaged."""
        self._path = state / FILE
        self._disk = disk or Disk()
        self._lock = anyio.Lock()
        self._seen: dict[str, Checkpoint] = {}
        self._texts: dict[str, str] = {}
        try:
            self._texts = dict(canonical.loads(self._path.read_bytes(), _Seen).checkpoints)
            self._seen = {origin: notes.parse(text) for origin, text in self._texts.items()}
        except FileNotFoundError:
            pass
        except ValueError as e:
            raise ConfigError(
                f"{self._path}: {e}", hint="restore it from a backup; removing it forgets what the logs have said"
            ) from None

    def sizes(self) -> dict[str, int]:
        """Return the largest size seen of each log."""
        return {origin: seen.size for origin, seen in self._seen.items()}

    async def saw(self, text: str, log: Log, door: RekorLog) -> None:
        """Take a checkpoint that came with an entry: it must agree with all seen before.

        Raises `TwoHistories` when it does not, `ValueError` for a checkpoint that the log did not sign, and
        what `door.consistency` raises while the log does not answer.
        """
        new = notes.parse(text)
        notes.check_signature(new, log)
        async with self._lock:
            known = self._seen.get(new.origin)
            if known is not None:
                old, later = (known, new) if known.size <= new.size else (new, known)
                proof = await door.consistency(old, later)
                try:
                    tree.check_consistency(old.size, old.root, later.size, later.root, proof)
                except ValueError as e:
                    raise TwoHistories(f"log {new.origin} shows two histories: {e}") from None
            if known is None or new.size > known.size:
                texts = {**self._texts, new.origin: text}
                self._disk.put(self._path, canonical.dumps(_Seen(1, texts)), 0o600)
                self._texts, self._seen[new.origin] = texts, new
