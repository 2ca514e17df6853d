"""A changed configuration, taken up by a running node: whole, or not at all.

    `stella signals reload` ──SIGUSR1──▶ supervisor: read, compare, refuse what no running node can take up
                                            ├─ collector: applies it to the loaded probes, between two batches
                                            └─ enrichers, signer, gateway: one after the other is started anew
    `stella signals reload` ◀──run/reload.json── what became of it

The collector comes first, for it alone can refuse; then the old configuration goes on.  Nothing is lost by it:
the probes stay where they are, and a part that starts anew leaves its work in the bus.  The collector's next
batch says which configuration holds from there on, so the change itself is evidence.

A crash in between leaves a node that runs on the new file, for each part reads that at its next start.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import click
import msgspec

from stella_cli import node_file, process, reload_plan
from stella_cli.settings import Settings
from stella_shared import config
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound, NotPermitted, StellaError, TryAgain

if TYPE_CHECKING:
    from stella_cli.supervisor import Supervisor

#: How long the collector may take to say that it has taken the configuration up, or why not.
COLLECTOR_SECONDS: Final = 10.0
#: A part that starts anew: it works off what it has, ends, starts, beats.
PART_SECONDS: Final = 60.0
WAIT_SECONDS: Final = 180.0


class Outcome(msgspec.Struct, frozen=True):
    """What became of one reload.  `changed` are dotted keys, `parts` who took them up."""

    at: float
    ok: bool
    changed: list[str] = []
    parts: list[str] = []
    error: str = ""
    hint: str = ""


# ---- in the supervisor


async def apply(supervisor: Supervisor) -> Outcome:
    """Read the configuration anew and have every part that it concerns take it up."""
    plan = supervisor.plan
    changed: list[str] = []
    try:
        new = plan.load()
        config.check_runnable(new)
        changed = reload_plan.changed(plan.signals, new)
        parts = reload_plan.takers(changed)
        if "collector" in parts:
            await _collector(supervisor, new)
    except StellaError as e:
        return Outcome(time.time(), False, changed, [], str(e), e.hint)
    supervisor.take(new)
    try:
        for service in parts:
            if service != "collector":
                await supervisor.renew(service, PART_SECONDS)
    except StellaError as e:
        return Outcome(time.time(), False, changed, parts, str(e), e.hint)
    return Outcome(time.time(), True, changed, parts)


async def _collector(supervisor: Supervisor, new: Signals) -> None:
    """Have the collector take `new` up.  Raises `ConfigError` when it does not; it goes on with the old one then."""
    part = supervisor.part("collector")
    if part is None or part.child is None:
        raise ConfigError("no collector runs that could take the configuration up")
    wanted = config.digest(new)
    supervisor.write(new)
    part.child.send(signal.SIGHUP)
    with anyio.move_on_after(COLLECTOR_SECONDS):
        while True:
            told = part.beat.detail.get("config") if part.beat else None
            if isinstance(told, dict) and told.get("sha256") == wanted:
                return
            if isinstance(told, dict) and told.get("refused_sha256") == wanted:
                supervisor.write(supervisor.plan.signals)
                raise ConfigError(f"the collector refuses it: {told.get('refused')}", hint="nothing was changed")
            await anyio.sleep(0.05)
    supervisor.write(supervisor.plan.signals)
    part.child.send(signal.SIGHUP)
    raise ConfigError(
        f"the collector has not taken it up in {COLLECTOR_SECONDS:.0f} s",
        hint=f"its log says why: {part.log.path}; it was told to go on with the old configuration",
    )


def outcome_path(state: Path) -> Path:
    """Return where the last reload's outcome stands."""
    return state / "run" / "reload.json"


# ---- the command


def run(settings: Settings, output: str) -> None:
    """Ask the running node to take up its changed configuration, and say what became of it."""
    config.check_runnable(settings.signals)
    node = node_file.running(settings.state)
    if node is None:
        raise NotFound(
            f"no node runs on {settings.state}",
            hint="if it was started with --config or --target, give the same ones here",
        )
    asked = time.time()
    try:
        fd = os.pidfd_open(node.who.pid)
        try:
            if process.is_alive(node.who):
                signal.pidfd_send_signal(fd, signal.SIGUSR1)
        finally:
            os.close(fd)
    except ProcessLookupError:
        raise NotFound(f"the node (pid {node.who.pid}) has just ended") from None
    except PermissionError:
        raise NotPermitted(
            f"the node (pid {node.who.pid}) runs as another user", hint="sudo stella signals reload"
        ) from None
    _show(_outcome(settings.state, asked, node), output)


def _outcome(state: Path, asked: float, node: node_file.NodeFile) -> Outcome:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            found = msgspec.json.decode(outcome_path(state).read_bytes(), type=Outcome)
        except (OSError, msgspec.MsgspecError):
            found = None
        if found is not None and found.at >= asked:
            return found
        if not process.is_alive(node.who):
            raise NotFound("the node has ended meanwhile", hint=f"its logs: {state / 'logs'}")
        time.sleep(0.05)
    raise TryAgain(f"the node has not answered in {WAIT_SECONDS:.0f} s", hint=f"its logs: {state / 'logs'}")


def _show(outcome: Outcome, output: str) -> None:
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(outcome)).decode())
        if not outcome.ok:
            raise click.exceptions.Exit(ConfigError.exit_code)
        return
    if not outcome.ok:
        raise ConfigError(outcome.error, hint=outcome.hint)
    if not outcome.changed:
        click.echo("nothing has changed")
        return
    for key in outcome.changed:
        click.echo(f"changed  signals.{key}")
    click.echo(f"taken up by: {', '.join(outcome.parts)}; nothing was lost by it")
