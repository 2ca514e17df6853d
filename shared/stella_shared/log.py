"""A service's own log: standard `logging`, written to standard error as JSON lines or as text.

    {"at":"2026-01-28T02:30:48.000000000Z","level":"warning","service":"collector","message":"…","dropped":1523}

What is given as `extra={...}` stands beside the message.  Under systemd each line is led by its syslog
priority (sd-daemon(3)), so that `journalctl -p err` works.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Final

from stella_shared import clock

if TYPE_CHECKING:
    from stella_shared.config import Logging
    from stella_shared.errors import StellaError

LINE_MAX_CHARACTERS: Final = 16384
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG_PRIORITY: Final = 7


def setup(service: str, config: Logging) -> logging.Logger:
    """Send all logging of this process to standard error as `config` says; return the service's logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(service, config.format == "json", _to_journal()))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # It tells of every request at the level at which we tell of what happened.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return logging.getLogger(f"stella.{service}")


def fatal(error: StellaError) -> int:
    """Write why a service cannot run to standard error, for people; return its exit code."""
    print(f"Error: {error}", *([f"Hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
    return error.exit_code


class _Lines(logging.Formatter):
    """One line for each record, whatever it holds."""

    def __init__(self, service: str, as_json: bool, journal: bool) -> None:
        super().__init__()
        self._service = service
        self._as_json = as_json
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        message = record.getMessage()
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            extra["traceback"] = self.formatException(record.exc_info)
        at = clock.utc_text(int(record.created * 1e9))
        if self._as_json:
            content = {"at": at, "level": level, "service": self._service, "message": message, **extra}
            line = json.dumps(content, default=repr)
        else:
            said = "".join(f" {key}={value}" for key, value in extra.items())
            line = f"{at[:23]}Z {level:<7} {self._service} {message}{said}".replace("\n", "\n    ")
            line = "".join(c if c.isprintable() or c == "\n" else "�" for c in line)
        if len(line) > LINE_MAX_CHARACTERS:
            line = self._cut(line, content if self._as_json else None)
        return f"<{_priority(record.levelno)}>{line}" if self._journal else line

    @staticmethod
    def _cut(line: str, content: dict[str, object] | None) -> str:
        """Bound a line; a JSON line stays JSON."""
        if content is None:
            return line[:LINE_MAX_CHARACTERS] + "…"
        kept = {key: content[key] for key in ("at", "level", "service")}
        kept["message"] = str(content["message"])[: LINE_MAX_CHARACTERS // 2] + "…"
        return json.dumps(kept)


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), _DEBUG_PRIORITY)


def _to_journal() -> bool:
    """True when standard error is the journal's socket (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
