"""`stella version`."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata

import click

from stella_cli import collector_report
from stella_shared import VERSION
from stella_shared.errors import StellaError

_DISTRIBUTION = "stella-signals"


def package_version() -> str:
    """Return our version as installed; that of the source tree when it is run from there."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return VERSION


def found() -> dict[str, str]:
    """Return the versions by name: ours, libbpf and the BPF object (its digest), Python, the kernel."""
    system = os.uname()
    try:
        told = collector_report.ask(None, "--versions")
    except StellaError:
        told = {}
    return {
        _DISTRIBUTION: package_version(),
        "libbpf": str(told.get("libbpf", "not installed")),
        "bpf-object": str(told.get("bpf-object", "not installed")),
        "python": platform.python_version(),
        "kernel": f"{system.release} {system.machine}",
    }


def show(*, as_json: bool) -> None:
    """Print the versions of everything that shapes the evidence."""
    facts = found()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name} {value}")
