"""Commands about `stella` itself."""

from __future__ import annotations

import click

from stella_cli.commands.groups import stella
from stella_cli.commands.options import output_form


@stella.command()
@output_form("text", "json")
def version(form: str | None) -> None:
    """Show the version of Stella Signals and of what it runs on.

    \b
    Example:
      stella version --format json
    """
    from stella_cli import versions

    versions.show(as_json=form == "json")


@stella.command(short_help="Print what completes commands in your shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that lets your shell complete commands and options of stella.

    \b
    Examples:
      stella completion bash > /etc/bash_completion.d/stella
      stella completion zsh > "${fpath[1]}/_stella"
      stella completion fish > ~/.config/fish/completions/stella.fish
      source <(stella completion bash)
    """
    from stella_cli import completing

    completing.show(shell, stella)
