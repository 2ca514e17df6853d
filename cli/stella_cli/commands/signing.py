"""Commands about signatures and the transparency log."""

from __future__ import annotations

import click

from stella_cli.commands.groups import signals, signer
from stella_cli.commands.options import everywhere, output_form, settings


@signals.command("resubmit-pending", short_help="Submit to the log what is not in it yet.")
@everywhere
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0, 86400),
    default=0.0,
    metavar="SECONDS",
    help="Go on trying this long while the log does not answer. Without it: not at all.",
)
@output_form("text", "json")
def resubmit_pending(wait_seconds: float, form: str | None) -> None:
    """Submit signed chunks to the transparency log that are not in it yet, and those it refused before.

    Safe to run while the node runs, and to run twice: the same bytes are submitted, and nothing is logged twice.
    Works with signals.signing.submit_to_rekor switched off, as long as a log is configured.

    \b
    Examples:
      stella signals resubmit-pending
      stella signals resubmit-pending --wait 600
    Exit codes: 0 nothing is left, 1 the log refused some for good, 2 no log is configured, 10 some are left
    """
    from stella_cli import resubmitting

    resubmitting.run(settings(), wait_seconds=wait_seconds, as_json=form == "json")


@signer.command("status", short_help="Show key, services, queue and last error of the signer.")
@everywhere
@output_form("text", "json")
def signer_status(form: str | None) -> None:
    """Show which key signs, which log and authorities are used, what waits to be logged, and the last error.

    \b
    Examples:
      stella signer status
      stella signer status --format json
    Exit codes: 0 it works, 1 it cannot sign or submit, 4 nothing runs, 10 the gateway does not answer
    """
    from stella_cli import signer_status as status_of_signer

    status_of_signer.run(settings(), as_json=form == "json")
