"""Reads strangers' files: `python -m stella_collector.binaries.child SOCKET`, started by `reader`.

A file out of a container is hostile until proven otherwise, and the collector has powers.  This process gives up
everything first (`stella_shared.confinement`), loads the readers, and then forks for each file: a file is read by a
process that has read no other, with bounded memory, CPU time and answer.  To be warm already is what makes a new
program's functions known within some milliseconds.

    request   one byte, and three descriptors: the file, the question (MessagePack), where the answer goes
    reply     one byte: "A" it is written, "T" the time was up, "M" the reader has ended in some other way
"""

from __future__ import annotations

import os
import platform
import select
import signal
import socket
import sys
from typing import Final

import msgspec

from stella_collector.binaries import elf
from stella_collector.binaries.question import ANSWER_BYTES_MAX, Answer, Question
from stella_shared import confinement

MEMORY_BYTES: Final = 1 << 30
SECONDS: Final = 20
_QUESTION_BYTES_MAX: Final = 32 << 20


def read(file: int, question: int, out: int) -> None:
    """Read one file and write the answer.  In a process of its own."""
    confinement.limit(MEMORY_BYTES, ANSWER_BYTES_MAX, SECONDS)
    asked = msgspec.msgpack.decode(os.pread(question, _QUESTION_BYTES_MAX, 0), type=Question)
    try:
        with os.fdopen(os.dup(file), "rb") as opened:
            found = elf.answer(opened, asked, platform.machine())
    except MemoryError:
        found = Answer(reason="it is too large to be read")
    except elf.REFUSALS:
        found = Answer(reason="it is no ELF file that can be read")
    data = msgspec.msgpack.encode(found)
    if len(data) > ANSWER_BYTES_MAX:
        data = msgspec.msgpack.encode(Answer(reason="it has more functions than can be told"))
    os.pwrite(out, data, 0)


def serve(requests: socket.socket) -> None:
    """Answer until the other end closes."""
    while True:
        word, descriptors, _, _ = socket.recv_fds(requests, 1, 3)
        if not word:
            return
        reply = b"M"
        if len(descriptors) == 3:
            reply = _in_a_process(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.sendall(reply)


def _in_a_process(file: int, question: int, out: int) -> bytes:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            confinement.end_with_parent()
            read(file, question, out)
            code = 0
        finally:
            os._exit(code)
    handle = os.pidfd_open(pid)
    try:
        ended = bool(select.select([handle], [], [], SECONDS)[0])
    finally:
        os.close(handle)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return b"T"
    return b"A" if status == 0 else b"M"


def main(arguments: list[str]) -> int:
    """Run the child."""
    with socket.socket(fileno=int(arguments[0])) as requests:
        os.nice(5)
        confinement.give_up_privileges()
        serve(requests)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
