"""`stella signals reset-chain`: the old evidence is moved aside, a new chain that names it begins."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from stella_cli import node_file, signer_process
from stella_cli.settings import Settings
from stella_shared.errors import NotFound, StellaError, TryAgain, UsageError
from stella_shared.evidence import keys, names, notes, reset
from stella_shared.evidence.store import initialise, places, signer_lock

DEFAULT_REASON = "reset by the operator"


def run(settings: Settings, *, confirm: bool, reason: str | None) -> None:
    """Begin a new chain.  A reset that an earlier call began is carried through, with the reason given then."""
    text = notes.plain(reason) if reason is not None else DEFAULT_REASON
    where = places(settings.signals)
    if reset.pending(settings.state) is None and not _holds_anything(where.evidence):
        raise NotFound(
            f"{where.evidence} holds no chain to leave", hint="a first chain is made by: stella signals init"
        )
    if not confirm:
        raise UsageError(
            f"this would move {where.evidence} aside, whole, to a directory beside it, and begin a new chain there "
            "that names the old one; the two then verify apart",
            hint="stella signals reset-chain --confirm [--reason TEXT]",
            runbook="emergency-clear-corrupted-state",
        )
    keys.load_trusted(settings.state)  # a broken list would stop us half way
    node_file.make_state_directory(settings.state)
    with node_file.lock(settings.state):
        if reset.pending(settings.state) is None:
            _finish_old(settings)
            with signer_lock(where):
                reset.begin(where.evidence, where.state, text)
        begun = reset.pending(settings.state)
        made = initialise(settings.signals)
    if begun is not None and (aside := where.evidence.with_name(begun.aside)).exists():
        click.echo(f"old evidence   {aside}")
    before = made.predecessor
    click.echo(f"new chain      {made.chain_id} in {made.evidence}")
    if before is not None:
        click.echo(
            f"follows        {before.chain_id or 'an unknown chain'} up to chunk {before.index}: {before.reason}"
        )


def _holds_anything(evidence: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any(path.name != names.KEYS for path in evidence.iterdir())
    return False


def _finish_old(settings: Settings) -> None:
    """Let the signer's process close and sign what the old chain still has open, if it can be done."""
    try:
        signer_process.run(settings, "--once")
    except TryAgain:
        if not signer_process.signer_is_away(settings):
            raise
        click.echo("the old chain's open chunk waits for batches and stays open", err=True)
    except StellaError as e:
        click.echo(f"the old chain is left as it is: {e}", err=True)
