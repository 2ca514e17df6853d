"""`stella signals test-probes`: the collector attaches each probe once and reports; we show it."""

from __future__ import annotations

import json
from typing import Any, Final

import click

from stella_cli import collector_report, console
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, BrokenPromise, NotPermitted

#: The collector's reason for a probe that is not to attach: that is no failure.
_OFF: Final = "switched off"
_COLUMNS: Final = ("probe", "attached", "attach_point", "kernel", "permission", "cost_ns", "reason", "fix")
_HEADINGS: Final = {"attach_point": "attach point", "kernel": "kernel has it", "cost_ns": "ns per event"}


def run(settings: Settings, *, as_json: bool) -> None:
    """Print the report.  Raises `NotPermitted` or `BadAnswer` when a probe that is switched on does not attach."""
    rows = _rows(collector_report.ask(settings.path, "--test-probes", "--format", "json"))
    bad = [row for row in rows if not row.get("attached") and not str(row.get("reason")).startswith(_OFF)]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        headings = [_HEADINGS.get(column, column) for column in _COLUMNS]
        console.table(headings, [[_cell(row.get(column)) for column in _COLUMNS] for row in rows])
    if bad:
        refused = any(row.get("permission") is False for row in bad)
        raise (NotPermitted if refused else BadAnswer)(
            f"{len(bad)} of {len(rows)} probes do not attach: {', '.join(str(r.get('probe')) for r in bad)}",
            hint="; ".join(dict.fromkeys(str(r["fix"]) for r in bad if r.get("fix"))),
            runbook="issue-probe-failed-to-attach",
        )


def _rows(report: object) -> list[dict[str, Any]]:
    if isinstance(report, list) and all(isinstance(row, dict) for row in report):
        return report
    raise BrokenPromise("the collector's report is no list of probes")


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}"
    return "" if value is None else str(value)
