"""`stella signals cleanup`: the lines of old chunks go, and the chain says so."""

from __future__ import annotations

import time
from pathlib import Path

import click

from stella_cli import signer_process, verifying
from stella_cli.settings import Settings
from stella_shared import clock
from stella_shared.errors import NotPermitted, TryAgain, UsageError
from stella_shared.evidence import cleanup
from stella_shared.evidence.store import places


def run(settings: Settings, older_than: str, *, keep_chain_state: bool, dry_run: bool) -> None:
    """Remove the lines of chunks whose window ended longer ago than `older_than`, after a note is signed.

    Raises `BadAnswer` when the chain does not verify; nothing is removed then.
    """
    if not keep_chain_state:
        raise UsageError(
            "without --keep-chain-state the ledgers and signatures would go too, and that would break the chain",
            hint="stella signals cleanup --keep-chain-state --older-than AGE; to leave a chain for good: "
            "stella signals reset-chain --confirm",
            runbook="procedure-rotate-evidence-directory",
        )
    age = cleanup.age_seconds(older_than)
    chain = verifying.own_chain(settings)
    before = clock.utc_text(max(0, time.time_ns() - age * 10**9))
    where = places(settings.signals)
    plan = cleanup.Cleanup(where, chain, ended_before=before, must_be_logged=settings.signals.signing.submit_to_rekor)
    if plan.kept_for_the_log:
        click.echo(f"kept until they are in the log: {_words(plan.kept_for_the_log)}")
    if not plan.indexes:
        click.echo(f"nothing to remove: no signed chunk with lines ended before {before}")
        return
    told = f"lines of {_words(plan.indexes)} ({plan.bytes} bytes)"
    if dry_run:
        click.echo(f"would remove the {told}")
        return
    try:
        signer_process.record(settings, plan.notes())
        plan.remove()
    except PermissionError as e:
        raise NotPermitted(
            f"{e.filename or where.evidence}: {e.strerror}", hint="run as the owner of the evidence, or as root"
        ) from None
    except OSError as e:
        raise TryAgain(
            f"{e.filename or where.evidence}: {e.strerror}", hint="run the command again: it goes on where it ended"
        ) from None
    click.echo(f"removed the {told}; the chain says so in a signed note")
    click.echo(f"check: stella signals verify-chain {Path(where.evidence)}")


def _words(indexes: list[int]) -> str:
    """Return chunk indexes for people."""
    found = [str(s.first) if s.first == s.last else f"{s.first} to {s.last}" for s in cleanup.spans(indexes)]
    return f"{'chunk' if len(indexes) == 1 else 'chunks'} {', '.join(found)}"
