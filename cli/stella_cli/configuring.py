"""`stella config check` and `stella config show`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from stella_cli import settings
from stella_shared import config
from stella_shared.config import Origin
from stella_shared.config_oddities import Oddity, oddities
from stella_shared.errors import ConfigError, NotFound


def check(file: str, *, as_json: bool) -> int:
    """Print what is wrong and what is odd in a file.  Returns 0, or 2 when no node would start with it."""
    path = Path(file)
    if not path.exists():
        raise NotFound(f"no configuration file {file}", hint=f"make one: stella signals init --config {file}")
    faults: list[str] = []
    odd: list[Oddity] = []
    lines: dict[str, str] = {}
    try:
        signals = config.load(path, {})
        lines = {origin.key: origin.source for origin in config.origins(path, {})}
        odd = oddities(signals)
        config.check_runnable(signals)
    except ConfigError as e:
        faults = str(e).splitlines()
    if as_json:
        told = [{"key": o.key, "source": lines[o.key], "message": o.message} for o in odd]
        body = {"file": file, "usable": not faults, "faults": faults, "warnings": told}
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
        return ConfigError.exit_code if faults else 0
    for fault in faults:
        click.echo(f"Fault: {fault}")
    for one in odd:
        source = lines[one.key]
        where = "" if source == "default" else f"{source}: "
        click.echo(f"Warning: {where}{one.key}: {one.message}")
    if faults:
        raise ConfigError(f"{file} cannot be used: {_count(len(faults), 'fault')}")
    click.echo(f"{file} can be used" + (f": {_count(len(odd), 'warning')}" if odd else ""))
    return 0


def show(given: str | None, target: str | None, *, effective: bool, as_json: bool) -> None:
    """Print the values in force and where each comes from; with `effective` the defaults too."""
    path = settings.config_path(given)
    overrides = {"output_directory": str(Path(target).absolute())} if target else {}
    found = [
        Origin(o.key, _without_passwords(o.value), o.source)
        for o in config.origins(path, os.environ, overrides)
        if effective or o.source != "default"
    ]
    if as_json:
        content = [{"key": o.key, "value": o.value, "source": o.source} for o in found]
        body = {"file": str(path) if path else None, "values": content}
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
        return
    click.echo(f"# {path or 'no file: built-in defaults'}")
    for line in _yaml(found):
        click.echo(line)


def _yaml(found: list[Origin]) -> list[str]:
    """Return the values as a configuration file, each with its origin as a comment."""
    rows: list[tuple[str, str]] = []
    above: list[str] = []
    for origin in found:
        *sections, name = origin.key.split(".")
        shared = 0
        while shared < min(len(sections), len(above)) and sections[shared] == above[shared]:
            shared += 1
        rows += [(f"{'  ' * depth}{sections[depth]}:", "") for depth in range(shared, len(sections))]
        above = sections
        rows.append((f"{'  ' * len(sections)}{name}: {_scalar(origin.value)}", origin.source))
    width = min(max((len(text) for text, _ in rows), default=0), 56)
    return [f"{text:<{width}}  # {source}" if source else text for text, source in rows]


def _without_passwords(value: Any) -> Any:
    """Return a value without what stands before the host of a URL."""
    if isinstance(value, list):
        return [_without_passwords(item) for item in value]
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", value) if isinstance(value, str) else value


def _scalar(value: Any) -> str:
    # JSON's flow forms are YAML; text is quoted, so that no word turns into something else.
    return json.dumps(value, ensure_ascii=False)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
