"""The groups that commands stand in."""

from __future__ import annotations

import click

from stella_cli.commands.options import EXIT_CODES, everywhere


@click.group(
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@everywhere
def stella() -> None:
    """Runtime evidence from the kernel: collected, signed, verifiable.

    \b
    First steps, as root:
      stella signals init
      stella signals start
    """


@stella.group(epilog=EXIT_CODES)
@everywhere
def signals() -> None:
    """Run a node, watch it, and check its evidence."""


@stella.group(epilog=EXIT_CODES)
@everywhere
def signer() -> None:
    """Ask the signer: which key signs, and what waits for the transparency log."""


@stella.group(epilog=EXIT_CODES)
@everywhere
def config() -> None:
    """Check a configuration, and show what is in force and why."""
