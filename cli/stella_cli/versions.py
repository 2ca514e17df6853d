"""`stella version`."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import click

from stella_shared import VERSION

_DISTRIBUTION = "stella-signals"


def package_version() -> str:
    """Return our version as installed; that of the source tree when it is run from there."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return VERSION


def show(*, as_json: bool) -> None:
    """Print the versions of everything that shapes the evidence."""
    system = os.uname()
    facts = {
        _DISTRIBUTION: package_version(),
        "python": platform.python_version(),
        "kernel": f"{system.release} {system.machine}",
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name} {value}")
