"""The services' log files: bounded, and read along as they grow.

A service appends to its file itself and never waits for us.  We read behind it, to show warnings and to know
the last words of one that died.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

MAX_BYTES: Final = 10 << 20
_READ_BYTES: Final = 1 << 20
_HINT: Final = "Hint: "
_LEVELS: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_NATS_LEVELS: Final = {"[DBG]": 7, "[TRC]": 7, "[INF]": 6, "[WRN]": 4, "[ERR]": 3, "[FTL]": 2}
_TEXT_LINE: Final = re.compile(r"\S+Z (debug|info|warning|error|critical) +\S+ (.*)")


class Line(NamedTuple):
    """One line of a service's log: syslog severity (3 error, 4 warning, 6 info) and what it says."""

    severity: int
    text: str
    raw: str


def parse(raw: str) -> Line:
    """Return `raw` with its severity.  Knows our JSON and text forms, and nats-server's."""
    if raw.startswith("{"):
        try:
            record = json.loads(raw)
            severity = _LEVELS.get(str(record["level"]), 6)
            return Line(severity, str(record["message"]), raw)
        except (ValueError, KeyError):
            pass
    match = _TEXT_LINE.fullmatch(raw)
    if match:
        return Line(_LEVELS[match[1]], match[2], raw)
    for mark, severity in _NATS_LEVELS.items():
        if mark in raw[:64]:
            text = raw.split(mark, 1)[1].strip()
            # The passwords stand in a file of mode 0600 that only the server reads: nothing to warn of.
            return Line(6 if text.startswith("Plaintext passwords detected") else severity, text, raw)
    if raw.startswith("Error:"):
        return Line(3, raw.removeprefix("Error:").strip(), raw)
    return Line(6, raw, raw)


class ServiceLog:
    """One service's log file.  Reading starts at its end as of now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bound()
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._unread: list[Line] = []
        self.recent: deque[Line] = deque(maxlen=40)

    def bound(self) -> None:
        """Move the file's content to `<name>.1` when it is over `MAX_BYTES`.

        The file is copied and cut, not renamed: a running service keeps appending to it.  Lines written in
        between are lost, which a log may and evidence may not.
        """
        if self.path.exists() and self.path.stat().st_size > MAX_BYTES:
            shutil.copyfile(self.path, self.path.with_name(self.path.name + ".1"))
            with self.path.open("r+b") as file:
                file.truncate(0)
            self._offset = 0

    def new_lines(self) -> list[Line]:
        """Return what was written since the last call, line by line."""
        lines = self._unread + self._take()
        self._unread = []
        return lines

    def _take(self) -> list[Line]:
        try:
            if self.path.stat().st_size == self._offset:
                return []
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_READ_BYTES)
                self._offset += len(data)
        except OSError:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        # A line without end is cut: nothing a service writes may grow without bound here.
        self._rest = self._rest[-_READ_BYTES:]
        texts = [raw.decode(errors="replace").rstrip() for raw in lines]
        found = [parse(text) for text in texts if text]
        self.recent.extend(found)
        return found

    def last_words(self) -> tuple[str, str]:
        """Return what a service that just ended said about it: its last error (else last line), a hint."""
        self._unread += self._take()
        hint = next((line.text for line in reversed(self.recent) if line.text.startswith(_HINT)), "")
        said = [line for line in self.recent if not line.text.startswith(_HINT)]
        errors = [line for line in said if line.severity <= 3]
        chosen = errors[-1] if errors else (said[-1] if said else None)
        return chosen.text if chosen else "it said nothing", hint.removeprefix(_HINT)
