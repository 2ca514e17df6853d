"""`stella signals test-probes`: the collector attaches each probe once and reports; we show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Final

import click

from stella_cli import console
from stella_cli.settings import Settings
from stella_shared.errors import (
    BadAnswer,
    BrokenPromise,
    NotFound,
    NotPermitted,
    StellaError,
    TryAgain,
    UsageError,
)

LIMIT_SECONDS: Final = 60.0
#: The collector's reason for a probe that is not to attach: that is no failure.
_OFF: Final = "switched off"
_COLUMNS: Final = ("probe", "attached", "attach_point", "kernel", "permission", "reason", "fix")
_BY_EXIT_CODE: Final[dict[int, type[StellaError]]] = {
    e.exit_code: e for e in (UsageError, NotPermitted, NotFound, TryAgain)
}


def run(settings: Settings, *, as_json: bool) -> None:
    """Print the report.  Raises `BadAnswer` when a probe that is switched on does not attach."""
    command = [sys.executable, "-m", "stella_collector", "--test-probes", "--format", "json"]
    if settings.path is not None:
        command += ["--config", str(settings.path)]
    try:
        done = subprocess.run(command, capture_output=True, env=dict(os.environ), timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TryAgain(f"the collector did not report within {LIMIT_SECONDS:.0f} s") from None
    rows = _rows(done)
    bad = [row for row in rows if not row.get("attached") and not str(row.get("reason")).startswith(_OFF)]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        headings = [column.replace("_", " ") for column in _COLUMNS]
        console.table(headings, [[_cell(row.get(column)) for column in _COLUMNS] for row in rows])
    if bad:
        raise BadAnswer(
            f"{len(bad)} of {len(rows)} probes do not attach: {', '.join(str(r.get('probe')) for r in bad)}",
            hint="; ".join(dict.fromkeys(str(r["fix"]) for r in bad if r.get("fix"))),
            runbook="issue-probe-failed-to-attach",
        )


def _rows(done: subprocess.CompletedProcess[bytes]) -> list[dict[str, Any]]:
    try:
        rows = json.loads(done.stdout)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            return rows
    except ValueError:
        pass
    said = done.stderr.decode(errors="replace").strip().splitlines()
    last = next((line for line in said if line.startswith("Error:")), said[-1] if said else "")
    message = last.removeprefix("Error:").strip() or f"exit code {done.returncode}"
    kind = _BY_EXIT_CODE.get(done.returncode, BrokenPromise)
    raise kind(f"the collector gave no report: {message}")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
