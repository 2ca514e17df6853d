"""What is known on disk about the running node: `run/node.lock` and `run/node.json` in the state directory.

The lock is held (flock) by the supervisor as long as it lives, so it can never be stale.  `node.json` tells
other commands whom to ask and whom to signal; after a kill -9 it is what the next start finds orphans with.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stella_cli import process
from stella_cli.process import Identity
from stella_shared import clock
from stella_shared.errors import NotPermitted, TryAgain


class ChildEntry(msgspec.Struct, frozen=True):
    """One part of the node and the process that is it now."""

    name: str
    who: Identity


class NodeFile(msgspec.Struct, frozen=True):
    """`run/node.json`."""

    who: Identity
    boot_id: str
    started_at: float
    config: str
    output_directory: str
    gateway_url: str
    bus_url: str
    demo: bool = False
    children: list[ChildEntry] = []


def make_state_directory(state: Path) -> None:
    """Make the state directory and its rooms, readable by their owner alone."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        for room in ("run", "logs", "nats"):
            (state / room).mkdir(mode=0o700, exist_ok=True)
        if not os.access(state / "run", os.W_OK):
            raise PermissionError(13, "Permission denied", str(state / "run"))
    except OSError as e:
        raise NotPermitted(
            f"cannot write the state directory {state}: {e.strerror}",
            hint="run as the owner of that directory (often root), or give another one: --target DIR, or "
            "signals.state_directory in the configuration",
            runbook="configuration-reference",
        ) from None


def write_private(path: Path, data: bytes) -> None:
    """Replace `path` by `data` with mode 0600: readers see the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    temporary.rename(path)


@contextlib.contextmanager
def lock(state: Path) -> Iterator[None]:
    """Hold the node's lock for the block.  Raises `TryAgain`, naming the pid, when another node holds it."""
    path = state / "run" / "node.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise TryAgain(
                f"a node is already running on {state} (pid {owner})",
                hint="`stella signals status` shows it, `stella signals stop` ends it",
                runbook="health-checks",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
        file.truncate(0)


def write(state: Path, node: NodeFile) -> None:
    """Write `run/node.json`."""
    write_private(state / "run" / "node.json", msgspec.json.format(msgspec.json.encode(node)) + b"\n")


def remove(state: Path) -> None:
    """Remove `run/node.json`: nothing runs."""
    (state / "run" / "node.json").unlink(missing_ok=True)


def read(state: Path) -> NodeFile | None:
    """Return what `run/node.json` says, true or not; None when there is none, or none that makes sense.

    Raises `NotPermitted` when the state directory belongs to somebody else.
    """
    try:
        return msgspec.json.decode((state / "run" / "node.json").read_bytes(), type=NodeFile)
    except PermissionError:
        raise NotPermitted(
            f"cannot look into the state directory {state}",
            hint="run as the owner of the node, often: sudo stella signals …",
            runbook="health-checks",
        ) from None
    except (OSError, msgspec.MsgspecError):
        return None


def running(state: Path) -> NodeFile | None:
    """Return the running node's file.  None when the supervisor it names is gone or somebody else now.

    Raises `NotPermitted` as `read` does.
    """
    node = read(state)
    if node is None or node.boot_id != clock.boot_id() or not process.is_alive(node.who):
        return None
    words = process.command_line(node.who.pid)
    return node if any("stella" in word for word in words) else None


def end_orphans(state: Path, patience_seconds: float = 10.0) -> list[str]:
    """End parts that outlived a dead supervisor; return their names.  Call only with the lock held.

    Each is recognised by pid, start time and boot, and by being one of our programs.
    """
    node = read(state)
    if node is None or node.boot_id != clock.boot_id():
        return []
    left = [c for c in node.children if process.is_alive(c.who) and _is_part(c)]
    names = [c.name for c in left]
    for number in (15, 9):
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.who.pid, number)
        deadline = time.monotonic() + patience_seconds
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            left = [c for c in left if process.is_alive(c.who)]
    return names


def _is_part(child: ChildEntry) -> bool:
    words = process.command_line(child.who.pid)
    return any("stella_" in word or "nats-server" in word for word in words)
