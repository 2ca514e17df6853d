"""Mangled names in, names as people write them out: asks a process of its own, for the demangler is a large parser.

The process is `demangler`.  A name that it does not answer in time costs it its life; some seconds later another one
is started.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from typing import Final

LENGTH: Final = struct.Struct("<H")
#: What starting the child may take, and what a name may.
_START_SECONDS: Final = 5.0
_NAME_SECONDS: Final = 0.5
_RESTART_SECONDS: Final = 5.0
_NAMES_MAX: Final = 65_536
_ANSWER_BYTES_MAX: Final = 4096


class Demangler:
    """Starts the child when the first name is asked for.  One thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self._known: dict[str, str | None] = {}

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None

    def demangled(self, name: str) -> str | None:
        """Return the demangled name; None when it has none, or when the child cannot be asked now."""
        if name in self._known:
            return self._known[name]
        raw = name.encode()
        if len(raw) > _ANSWER_BYTES_MAX:
            return None
        wait = _NAME_SECONDS
        if self._process is None:
            if time.monotonic() < self._not_before:
                return None
            self._not_before = time.monotonic() + _RESTART_SECONDS
            wait = _START_SECONDS
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "stella_enricher.symbols.demangler"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONDONTWRITEBYTECODE": "1", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}},
                cwd="/",
                bufsize=0,
            )
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(LENGTH.pack(len(raw)) + raw)
            answer = self._read(LENGTH.size, wait)
            answer = self._read(LENGTH.unpack(answer)[0], _NAME_SECONDS)
        except (OSError, EOFError):
            self.close()
            return None
        found = answer.decode("utf-8", "replace")
        if len(self._known) >= _NAMES_MAX:
            self._known.clear()
        self._known[name] = None if not found or found.startswith(("_Z", "_R")) else found
        return self._known[name]

    def _read(self, size: int, seconds: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        found = b""
        while len(found) < min(size, _ANSWER_BYTES_MAX):
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                raise EOFError("no answer")
            piece = os.read(self._process.stdout.fileno(), size - len(found))
            if not piece:
                raise EOFError("it has ended")
            found += piece
        return found
