"""Works a chain through a fixed script, one life a fork, so that a tracer can fail or kill it at any system call.

    python -m tests.signer.crash_driver    orders on standard input, answers on standard output, JSON, one a line

It imports everything once and forks for each order, so a life costs milliseconds.  A life that is to be traced stops
itself before its first step (`{"pid": …}`) and goes on at SIGCONT.  When it has ended, `{"code": …, "told": […]}`
follows: a negative code is a signal's number, and `told` is what it said on the way.  It says what is done only
after it is done, on a socket, so that no `write` is among its system calls but those of the signer.

Once for each script, an order with `warm` has it lived in the process itself, so that nothing is imported later.

    life     init, open, commits, closes by size, the stop       told: kept, ack, closed, stopped
    submit   rounds of the submitter, the first answer being no  told: logged, done
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
from tests.evidence.chain_maker import COVERAGE, Node, Source, one

from stella_shared.errors import StellaError
from stella_shared.evidence.disk import Disk
from stella_signer import trust_config
from stella_signer.outside import Outside
from stella_signer.steps import Settle
from stella_signer.submission import Submitter

Tell = Callable[..., None]
T = TypeVar("T")
NAME = "node-a"
#: After which batches a chunk is closed.
CLOSE_AFTER = frozenset({1, 3})
#: How often a life tries what the disk refused; the signer itself never gives up.
TRIES = 5


def batches() -> list[tuple[Settle, bytes]]:
    """Return the batches of the script, the same ones each time."""
    source = Source(NAME)
    counts = [({0: 3}, 1), ({0: 2, 7: 1}, 0), ({}, 0), ({3: 2, 0: 2}, 0)]
    return [
        source.batch(recorded, lost=lost, kernel_filtered=i, coverage=COVERAGE, final=i == len(counts) - 1)
        for i, (recorded, lost) in enumerate(counts)
    ]


def again(work: Callable[[], T]) -> T:
    """Do `work` as the signer does: while the disk refuses, again."""
    for attempt in range(TRIES):
        try:
            return work()
        except OSError:
            if attempt == TRIES - 1:
                raise
    raise AssertionError


def live(folder: Path, tell: Tell, disk: Disk | None = None) -> None:
    """Do whatever of the script is not in the evidence yet, as the bus brings what was not acknowledged."""
    node = Node(folder, NAME)
    store = again(lambda: node.open(disk))
    try:
        told = batches()
        tell("kept", numbers=[step.number for step, _ in told if store.is_settled(step.run, step.number)])
        for step, body in told:
            if store.is_settled(step.run, step.number):
                continue
            again(lambda step=step, body=body: store.commit(*one((step, body))))  # type: ignore[misc]
            tell("ack", number=step.number)
            if step.number in CLOSE_AFTER:
                again(lambda: store.close("size"))
                tell("closed", statement=store.last_statement_sha256)
        again(lambda: store.close("stop"))
        tell("stopped", statement=store.last_statement_sha256)
    finally:
        store.release()


def submit(folder: Path, documents: Path, tell: Tell) -> None:
    """Submit until nothing is left; what was refused is asked for again."""
    node = Node(folder, NAME)
    services = trust_config.choose(*documents.read_bytes().split(b"\n"), _now())

    async def work() -> None:
        async with Outside() as outside:
            submitter = again(
                lambda: Submitter(
                    node.where, outside, services, parallel=1, on_logged=lambda index: tell("logged", index=index)
                )
            )
            for attempt in range(3 * TRIES):
                try:
                    done = await submitter.round(retry_rejected=attempt > 0)
                except (StellaError, OSError):
                    continue
                if attempt and not done.left and not done.rejected and not done.error:
                    tell("done")
                    return
            raise AssertionError(f"{done.left} left, {done.rejected} rejected: {submitter.last_error}")

    anyio.run(work)


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


def _life(order: dict[str, Any], out: socket.socket) -> int:
    """Live one life; return its exit code."""

    def tell(what: str, **said: object) -> None:
        out.sendall(json.dumps({"what": what, **said}).encode() + b"\n")

    folder = Path(order["folder"])
    if order["traced"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if order["script"] == "submit":
            submit(folder, Path(order["documents"]), tell)
        else:
            live(folder, tell)
    except StellaError as e:
        tell("refused", error=str(e), hint=e.hint, kind=type(e).__name__)
        return e.exit_code
    except BaseException as e:
        import traceback

        tell("broke", error=repr(e), trace=traceback.format_exc())
        return 70
    return 0


def _answer(**said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Take orders until there are no more."""
    for line in sys.stdin:
        order = json.loads(line)
        mine, theirs = socket.socketpair()
        if order.get("warm"):
            code = _life(order, theirs)
            theirs.close()
            mine.close()
            _answer(code=code, told=[])
            continue
        pid = os.fork()
        if pid == 0:
            mine.close()
            os._exit(_life(order, theirs))
        theirs.close()
        if order["traced"]:
            os.waitpid(pid, os.WUNTRACED)
            _answer(pid=pid)
        said = b""
        while part := mine.recv(1 << 16):
            said += part
        mine.close()
        _, status = os.waitpid(pid, 0)
        _answer(code=os.waitstatus_to_exitcode(status), told=[json.loads(item) for item in said.splitlines()])


if __name__ == "__main__":
    main()
