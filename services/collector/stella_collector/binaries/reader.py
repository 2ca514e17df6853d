"""Asks the child process what a file holds: the only module that starts it.  Blocks; for threads."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from typing import Final

import msgspec

from stella_collector.binaries.question import ANSWER_BYTES_MAX, Answer, Question, checked
from stella_shared.errors import BrokenPromise

log = logging.getLogger(__name__)

FILE_BYTES_MAX: Final = 2 << 30
#: The child itself gives up a file after 20 seconds.
_PATIENCE_SECONDS: Final = 25.0


class Reader:
    """One child, started when it is first needed and again when it has ended.  One question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._abandoned = False

    def start(self) -> None:
        """Start the child ahead of the first question.

        Best from the main thread: the kernel ends the child with the thread that has started it.
        """
        with self._lock:
            self._abandoned = False
            self._started()

    def ask(self, file: int, question: Question) -> Answer:
        """Return what an open file holds.  Never raises for what is in it: then the answer is a reason."""
        size = os.fstat(file).st_size
        if size > FILE_BYTES_MAX:
            return Answer(reason="it is too large to be read")
        with self._lock:
            for _ in range(2):  # a child that was ended by somebody is no word about the file
                try:
                    return self._asked(file, question, size)
                except (OSError, EOFError) as e:
                    if self._abandoned:
                        break
                    log.warning("the reader of files has ended (%s); starting another one", e)
                    self._stop()
        return Answer(reason="the process that reads files cannot be kept alive")

    def abandon(self) -> None:
        """Ask nothing more; a question under way is over at once.  For another thread."""
        self._abandoned = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    def _asked(self, file: int, question: Question, size: int) -> Answer:
        connection = self._started()
        with contextlib.ExitStack() as stack:
            asked, out = (os.memfd_create(f"stella-{name}", os.MFD_CLOEXEC) for name in ("question", "answer"))
            stack.callback(os.close, asked)
            stack.callback(os.close, out)
            with os.fdopen(os.dup(asked), "wb") as f:
                f.write(msgspec.msgpack.encode(question))
            socket.send_fds(connection, [b"?"], [file, asked, out])
            if not select.select([connection], [], [], _PATIENCE_SECONDS)[0]:
                self._stop()
                return Answer(reason="it takes too long to read")
            reply = connection.recv(1)
            if not reply:
                raise EOFError("closed")
            if reply == b"T":
                return Answer(reason="it takes too long or too much memory to read")
            if reply != b"A":
                return Answer(reason="it is no ELF file that can be read")
            data = os.pread(out, ANSWER_BYTES_MAX + 1, 0)
        try:
            return checked(data, question, size)
        except BrokenPromise as e:
            return Answer(reason=f"what was read of it makes no sense: {e}")

    def _started(self) -> socket.socket:
        if self._socket is not None and self._process is not None and self._process.poll() is None:
            return self._socket
        self._stop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "stella_collector.binaries.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"PYTHONDONTWRITEBYTECODE": "1", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}},
                cwd="/",
            )
        self._socket = ours
        return ours

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
