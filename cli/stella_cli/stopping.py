"""`stella signals stop`: ask the supervisor to end, and wait until it has."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Final

import click

from stella_cli import node_file, process
from stella_cli.settings import Settings
from stella_shared.errors import NotFound, NotPermitted, TryAgain
from stella_shared.evidence import notes
from stella_shared.evidence.store import places, read_chain

#: Each stage of a stop has its own deadline; this is a little more than all of them together.
WAIT_SECONDS: Final = 180.0


def run(settings: Settings, reason: str | None = None) -> None:
    """End the node that runs on these settings' state directory.

    With a `reason`, its last chunk says that what follows is a planned gap, and why.
    """
    text = notes.plain(reason) if reason is not None else ""
    node = node_file.running(settings.state)
    if node is None:
        raise NotFound(
            f"no node runs on {settings.state}",
            hint="if it was started with --config or --target, give the same ones here; a node that was killed leaves "
            "its probes for the next start, and `stella signals detach` takes them out of the kernel",
        )
    try:
        fd = os.pidfd_open(node.who.pid)
        try:
            # Looked at again with the pid held: it cannot have passed to somebody else since.
            if not process.is_alive(node.who):
                return
            if reason is not None:
                signal.pidfd_send_signal(fd, 0)  # may we stop it at all?
                _leave_note(settings, text)
            signal.pidfd_send_signal(fd, signal.SIGTERM)
        finally:
            os.close(fd)
    except ProcessLookupError:
        return
    except PermissionError:
        raise NotPermitted(
            f"the node (pid {node.who.pid}) runs as another user", hint="sudo stella signals stop"
        ) from None
    click.echo(f"stopping the node (pid {node.who.pid})", nl=False)
    click.echo(" ", nl=False)
    deadline = time.monotonic() + WAIT_SECONDS
    next_dot = time.monotonic() + 1.0
    while process.is_alive(node.who):
        if time.monotonic() > deadline:
            click.echo()
            raise TryAgain(
                f"the node (pid {node.who.pid}) has not ended after {WAIT_SECONDS:.0f} s",
                hint=f"logs: {settings.state / 'logs'}; kill -9 {node.who.pid} ends it at once",
            )
        if time.monotonic() > next_dot and sys.stdout.isatty():
            click.echo(".", nl=False)
            next_dot += 1.0
        time.sleep(0.05)
    click.echo("stopped")


def _leave_note(settings: Settings, text: str) -> None:
    """Leave the signer a note of a planned gap: it stands in the chunk that the stop closes."""
    where = places(settings.signals)
    chain = read_chain(where.evidence)
    if chain is not None:
        notes.put(where, chain.chain_id, notes.make(notes.PLANNED_GAP, text=text))
