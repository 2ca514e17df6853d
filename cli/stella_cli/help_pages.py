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
    for path, command in _walk("stella", stella):
        context = click.Context(command, info_name=path, max_content_width=_WIDTH, terminal_width=_WIDTH)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts += ["", f"## `{path}`", "", "```text", text, "```"]
    return "\n".join(parts) + "\n"


def _walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            if not child.hidden:
                yield from _walk(f"{path} {name}", child)
