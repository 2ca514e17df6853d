"""Open files in, tables out: the only module that starts the reading process (`child`).  Blocks; for threads."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import Final

import msgspec

from stella_enricher.symbols.table import Broken, Table

#: At the limit of CPU time the kernel sends the first, a second later the other.
_OUT_OF_TIME: Final = (signal.SIGXCPU, signal.SIGKILL)


class Limits(msgspec.Struct, frozen=True):
    """What one file may cost."""

    file_bytes: int = 2 << 30
    memory_bytes: int = 1 << 30
    table_bytes: int = 64 << 20
    seconds: int = 20


class Captured(msgspec.Struct, frozen=True):
    """A table and its bytes; or, without them, the reason."""

    reason: str = ""
    data: bytes = b""
    table: Table | None = None


def capture(build_id: str, file: int, debug: int = -1, crc: int = -1, limits: Limits = Limits()) -> Captured:  # noqa: B008
    """Return the table of an open file.  Never raises for what a file holds.

    When its debug information is too much for the limits, what is inlined is left out, and the table says so.
    """
    if any(descriptor >= 0 and os.fstat(descriptor).st_size > limits.file_bytes for descriptor in (file, debug)):
        return Captured("too_large")
    found = _run(build_id, file, debug, crc, limits, with_inlined=True)
    if found.reason in ("malformed", "too_large", "timeout"):
        # Mostly it is the debug information that costs.
        again = _run(build_id, file, debug, crc, limits, with_inlined=False)
        return again if again.table is not None else found
    return found


def _run(build_id: str, file: int, debug: int, crc: int, limits: Limits, *, with_inlined: bool) -> Captured:
    words = [build_id, file, debug, crc, int(with_inlined), limits.memory_bytes, limits.table_bytes, limits.seconds]
    answer = os.memfd_create("stella-table", os.MFD_CLOEXEC)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "stella_enricher.symbols.child", *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            pass_fds=[descriptor for descriptor in (file, debug) if descriptor >= 0],
            env={"PYTHONDONTWRITEBYTECODE": "1", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}},
            cwd="/",
            close_fds=True,
        )
        try:
            code = process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return Captured("timeout")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code:
            return Captured("timeout" if -code in _OUT_OF_TIME else "malformed")
        said = os.pread(answer, limits.table_bytes + 1, 0)
    finally:
        os.close(answer)
    if said[:1] == b"R":
        return Captured(said[1:64].decode("ascii", "replace"))
    with contextlib.suppress(Broken):
        table = Table(said[1:])
        if said[:1] == b"T" and table.head.build_id == build_id:
            return Captured("", said[1:], table)
    return Captured("malformed")
