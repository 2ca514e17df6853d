"""The reference page of the command, made from the help texts: docs/reference/cli.md."""

from __future__ import annotations

from collections.abc import Iterator

import click

from stella_cli.commands import stella

_WIDTH = 96


def render() -> str:
    """Return docs/reference/cli.md."""
    parts = [
        "# The command `stella`",
        "",
        "Made from the help texts by `stella_cli.help_pages`; do not edit by hand.",
        "Options named on a group are taken before or after the command's name.",
    ]
    for context in _walk(stella, "stella", None):
        text = "\n".join(line.rstrip() for line in context.get_help().splitlines())
        parts += ["", f"## `{context.command_path}`", "", "```text", text, "```"]
    return "\n".join(parts) + "\n"


def _walk(command: click.Command, name: str, parent: click.Context | None) -> Iterator[click.Context]:
    settings = {**command.context_settings, "terminal_width": _WIDTH}
    context = click.Context(command, info_name=name, parent=parent, **settings)
    yield context
    if isinstance(command, click.Group):
        for child_name, child in command.commands.items():
            if not child.hidden:
                yield from _walk(child, child_name, context)
