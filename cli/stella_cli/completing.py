"""`stella completion`: what a shell has to run to complete our commands.  click makes it."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from stella_shared.errors import NotFound

#: click's variable for a program called `stella`.
_VARIABLE: Final = "_STELLA_COMPLETE"


def show(shell: str, command: click.Command) -> None:
    """Print the script for a shell.  Raises `NotFound` for a shell that click does not know."""
    kind = get_completion_class(shell)
    if kind is None:
        raise NotFound(f"there is no completion for {shell}", hint="bash, zsh and fish have one")
    click.echo(kind(command, {}, "stella", _VARIABLE).source())


def complete(command: click.Command, instruction: str) -> int:
    """Answer a shell that asks what may follow; `instruction` is what it put into `_STELLA_COMPLETE`."""
    from click.shell_completion import shell_complete

    return shell_complete(command, {}, "stella", _VARIABLE, instruction)
