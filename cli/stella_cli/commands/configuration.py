"""Commands about the configuration."""

from __future__ import annotations

import click

from stella_cli.commands.groups import config
from stella_cli.commands.options import everywhere, output_form, remembered


@config.command(short_help="Validate a configuration file.")
@everywhere
@click.argument("file", type=click.Path(dir_okay=False))
@output_form("text", "json")
def check(file: str, form: str | None) -> int:
    """Validate a configuration file and warn of what is allowed but odd, without running anything.

    Variables of the environment (STELLA_SIGNALS__…) are not looked at: the file is checked by itself.

    \b
    Examples:
      stella config check /etc/stellaops/stellaops.yaml
      stella config check ./stellaops.yaml --format json
    Exit codes: 0 it can be used (there may be warnings), 2 it cannot (each fault has its line), 4 no such file
    """
    from stella_cli import configuring

    return configuring.check(file, as_json=form == "json")


@config.command(short_help="Show the configuration and where each value comes from.")
@everywhere
@click.option("--effective", is_flag=True, help="Every key, those at their default too. Without it: what was set.")
@output_form("yaml", "json", default="yaml")
def show(effective: bool, form: str | None) -> None:
    """Show the values in force, each with its origin: default, file and line, environment, or option.

    It holds no secret: passwords, keys and tokens stand in files of their own, which are named only.
    The yaml is a configuration file again.

    \b
    Examples:
      stella config show --effective
      stella config show --effective --format json
      stella config show --config ./stellaops.yaml > running.yaml
    """
    from stella_cli import configuring

    configuring.show(remembered("config"), remembered("target"), effective=effective, as_json=form == "json")
