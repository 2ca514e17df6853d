"""`stella signals resubmit-pending`: the signer's own submission, run once, with its progress shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import click

from stella_cli import signer_process
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, ConfigError, NotFound, StellaError, TryAgain

_RUNBOOK: Final = "issue-rekor-submission-failures"


def run(settings: Settings, *, wait_seconds: float, as_json: bool) -> None:
    """Submit what is pending.  Raises `TryAgain` when some is left, `BadAnswer` when the log refused some."""
    with (
        signer_process.prepared(settings, "stella_signer.resubmit", "--wait", str(wait_seconds)) as start,
        subprocess.Popen(
            start.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **start.options
        ) as child,
    ):
        assert child.stdout and child.stderr
        last: dict[str, Any] = {"logged": 0, "left": 0, "rejected": 0, "error": ""}
        for line in child.stdout:
            last = json.loads(line)
            if as_json:
                click.echo(line, nl=False)
            elif sys.stderr.isatty():
                click.echo(f"\r{last['logged']} logged, {last['left']} left ", nl=False, err=True)
        said = child.stderr.read()
        code = child.wait()
    if not as_json and sys.stderr.isatty():
        click.echo(err=True)
    if code not in (0, 1, 10):
        raise _failure(code, said)
    if not as_json:
        click.echo(f"logged    {last['logged']}")
        click.echo(f"pending   {last['left']}")
        click.echo(f"rejected  {last['rejected']}")
    if code == 10:
        raise TryAgain(
            f"Failed to submit to Rekor: {last['error']}",
            hint="the chunks stay signed and in the queue; run the command again later, nothing is submitted twice",
            runbook=_RUNBOOK,
        )
    if code == 1:
        raise BadAnswer(
            f"the log refused {last['rejected']} chunks for good: {last['error']}",
            hint=f"{Path(settings.state) / 'rejected.json'} names each with the log's reason",
            runbook=_RUNBOOK,
        )


def _failure(code: int, said: str) -> StellaError:
    """Return the signer process's own refusal, or what it said when it died otherwise."""
    for line in reversed(said.splitlines()):
        try:
            told = json.loads(line)
            kind = {4: NotFound, 10: TryAgain}.get(code, ConfigError)
            return kind(str(told["error"]), hint=str(told["hint"]), runbook=_RUNBOOK)
        except (ValueError, KeyError, TypeError):
            continue
    return BadAnswer(f"the signer's process ended with code {code}: {said.strip()[-500:]}")
