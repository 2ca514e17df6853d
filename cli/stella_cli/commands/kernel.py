"""Commands about the probes in the kernel."""

from __future__ import annotations

import click

from stella_cli.commands.groups import signals
from stella_cli.commands.options import everywhere, output_form, settings


@signals.command("test-probes", short_help="Say which probes attach on this kernel.")
@everywhere
@output_form("text", "json")
def test_probes(form: str | None) -> None:
    """Attach every probe once, detach it again, and say which work on this kernel and what each costs.

    The cost is kernel time for an event, timed by the kernel while a small workload runs in a cgroup of its own;
    nothing else is watched, and nothing is kept.  Probes that are switched off are not tried.

    \b
    Examples:
      sudo stella signals test-probes
      sudo stella signals test-probes --format json
    Exit codes: 0 all attach, 1 some do not, 3 not permitted
    """
    from stella_cli import probing

    probing.run(settings(), as_json=form == "json")


@signals.command(short_help="Take our probes out of the kernel.")
@everywhere
@click.option("--all", "everything", is_flag=True, help="Those of every node on this machine, not of this one alone.")
@click.option("--pins", is_flag=True, help="Remove what runs that nobody reads hold, too: records and counters.")
@click.option("--dry-run", is_flag=True, help="Show what is loaded and what would be done, and do nothing.")
@click.option(
    "--wait",
    "wait_seconds",
    type=click.FloatRange(0, 600),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a node may take to close its evidence, before its collector is killed. 0: at once.",
)
@output_form("text", "json")
def detach(*, everything: bool, pins: bool, dry_run: bool, wait_seconds: float, form: str | None) -> None:
    """Take our probes out of the kernel, whether or not a node answers.

    Programs are found in the kernel itself, by name.  What the kernel lets go of is detached by id; it does not let
    go of tracepoints and uprobes, so the collector that holds those is ended, in order if it can be: with its node,
    which would start it again.  A process that is no collector of ours is never touched.

    A collector that was killed leaves its probes attached for the next one: their pins are removed.  What it had
    recorded and not told stays pinned, for the next start reads it.  With --pins that goes too: for nodes that never
    come back.

    \b
    Examples:
      sudo stella signals detach --all --dry-run
      sudo stella signals detach --all
      sudo stella signals detach --all --wait 0 --pins
    Exit codes: 0 nothing of it is left, 1 something is (the output says what holds it), 3 not permitted, 4 no node runs
    """
    from stella_cli import detaching

    detaching.run(
        settings(),
        everything=everything,
        pins=pins,
        dry_run=dry_run,
        wait_seconds=wait_seconds,
        as_json=form == "json",
    )
