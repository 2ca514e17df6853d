"""Commands about `stella` itself."""

from __future__ import annotations

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
