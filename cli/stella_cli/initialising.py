"""`stella signals init`: configuration file, directories, signing key.  Changes nothing that is there."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from stella_cli import settings
from stella_shared import config, config_layers
from stella_shared.errors import NotPermitted
from stella_shared.evidence.store import initialise

_WIDTH = 100


def run(given: str | None, output_directory: str | None) -> None:
    """Make what is missing, and say what was made and what to do next."""
    named = given or os.environ.get(settings.CONFIG_VARIABLE, "")
    path = Path(named).absolute() if named else None
    if path is not None and not path.exists():
        evidence = Path(output_directory).absolute() if output_directory else path.parent / "evidence"
        write_config(path, str(evidence))
        click.echo(f"configuration  {path} (new)")
        output_directory = None
    chosen = settings.load(given, output_directory)
    if path is None or chosen.path is None:
        click.echo(f"configuration  {chosen.name}")
    made = initialise(chosen.signals)
    click.echo(f"evidence       {made.evidence}{' (new chain)' if made.new_chain else ''}")
    click.echo(f"state          {made.state}")
    if made.key_id:
        click.echo(f"signing key    sha256:{made.key_id}{' (new)' if made.new_key else ''}")
        keep = "Keep the key's fingerprint in another place: it is how others know this node's evidence."
    else:
        click.echo(f"signing key    {chosen.signals.signing.key_id} (elsewhere)")
        keep = "`stella signer status` shows the running node's key or identity: it is how others know its evidence."
    flags = f" --config {named}" if named else (f" --target {output_directory}" if output_directory else "")
    click.echo(f"\n{keep}\nNext: sudo stella signals start{flags}")


def write_config(path: Path, output_directory: str) -> None:
    """Write a new configuration file that names every key."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(config_text(output_directory))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise NotPermitted(
            f"cannot write {path}: {e.strerror}", hint="choose a place of your own with --config"
        ) from None


def config_text(output_directory: str) -> str:
    """Return a configuration in which `output_directory` is set and every other key stands as a comment."""
    return "\n".join(_config_lines(output_directory)) + "\n"


def _config_lines(output_directory: str) -> Iterator[str]:
    yield "# Configuration of Stella Signals.  A key that stands behind # has the value shown."
    yield "# What each key allows: docs/reference/configuration.md"
    yield "signals:"
    section: list[str] = []
    for field in config_layers.fields(config.Signals, "signals"):
        *parents, name = field.key.split(".")[1:]
        depth = 0
        for depth, parent in enumerate(parents, 1):
            if section[:depth] != parents[:depth]:
                section = parents[:depth]
                yield f"\n  # {'  ' * (depth - 1)}{parent}:"
        section = parents
        indent = "  " * depth
        unit = (field.meta.extra or {}).get("unit")
        words = (field.meta.description or "").replace("`", "") + (f" Unit: {unit}." if unit else "")
        if name == "output_directory":
            yield from (f"  # {line}" for line in textwrap.wrap(words, _WIDTH))
            yield f"  output_directory: {json.dumps(output_directory, ensure_ascii=False)}"
            continue
        yield from (f"  # {indent}# {line}" for line in textwrap.wrap(words, _WIDTH))
        yield f"  # {indent}{name}: {json.dumps(field.default, ensure_ascii=False)}"
