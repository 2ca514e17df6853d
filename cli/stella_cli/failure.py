"""How a failure is told: one block on stderr, for people or as JSON, and the exit code.

Error: what was asked about, and the reason
Hint: what to do
See: runbook, section "…"
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from typing import Final

import click

from stella_shared.errors import StellaError

#: Exit codes that no error class owns.
EXIT_OK: Final = 0
EXIT_INTERRUPTED: Final = 130

#: Anchors of docs/runbook.md and the headings they stand for.
RUNBOOK_SECTIONS: Final = {
    "health-checks": "Health Checks",
    "issue-probe-failed-to-attach": "Issue: Probe Failed to Attach",
    "issue-ring-buffer-overflow": "Issue: Ring Buffer Overflow",
    "issue-high-memory-usage": "Issue: High Memory Usage",
    "issue-symbol-resolution-failures": "Issue: Symbol Resolution Failures",
    "issue-container-resolution-failures": "Issue: Container Resolution Failures",
    "issue-evidence-chain-verification-failure": "Issue: Evidence Chain Verification Failure",
    "issue-rekor-submission-failures": "Issue: Rekor Submission Failures",
    "procedure-rotate-evidence-directory": "Procedure: Rotate Evidence Directory",
    "procedure-update-collector": "Procedure: Update Collector",
    "procedure-change-the-configuration": "Procedure: Change the Configuration",
    "procedure-recover-from-crash": "Procedure: Recover from Crash",
    "procedure-air-gap-evidence-export": "Procedure: Air-Gap Evidence Export",
    "procedure-prove-one-event": "Procedure: Prove One Event",
    "configuration-reference": "Configuration Reference",
    "emergency-disable-collection": "Emergency: Disable Collection",
    "emergency-clear-corrupted-state": "Emergency: Clear Corrupted State",
    "support": "Support",
}


def leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that a task group's group of errors is about: ours if there is one, else the first."""
    errors: list[BaseException] = []
    groups: list[BaseExceptionGroup[BaseException]] = [group]
    while groups:
        for error in groups.pop().exceptions:
            (groups if isinstance(error, BaseExceptionGroup) else errors).append(error)  # type: ignore[arg-type]
    return next((e for e in errors if isinstance(e, StellaError | BrokenPipeError)), errors[0])


def wants_json(args: list[str]) -> bool:
    """Return whether the command line asks for JSON.  Looks at the bare words: they may be wrong."""
    return "--format=json" in args or any(a == "--format" and b == "json" for a, b in itertools.pairwise(args))


def tell(message: str, *, exit_code: int, kind: str, hint: str = "", runbook: str = "", as_json: bool) -> int:
    """Write one failure to stderr and return its exit code."""
    section = RUNBOOK_SECTIONS.get(runbook, runbook)
    if as_json:
        body = {"message": message, "kind": kind, "exit_code": exit_code, "hint": hint, "runbook": section}
        print(json.dumps({"error": body}, ensure_ascii=False), file=sys.stderr)
        return exit_code
    colour = sys.stderr.isatty()
    click.secho("Error: ", fg="red" if colour else None, bold=colour, nl=False, err=True)
    click.echo(message, err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    if section:
        click.echo(f'See: runbook, section "{section}"', err=True)
    return exit_code


def tell_stella_error(error: StellaError, *, as_json: bool) -> int:
    """Write an error of our own tree."""
    return tell(
        str(error),
        exit_code=error.exit_code,
        kind=type(error).__name__,
        hint=error.hint,
        runbook=error.runbook,
        as_json=as_json,
    )


def tell_usage(error: click.ClickException, *, as_json: bool) -> int:
    """Write a mistake in the command line: what is wrong, and how to see what is right."""
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "stella --help"
    return tell(error.format_message(), exit_code=2, kind="UsageError", hint=hint, as_json=as_json)


def tell_unknown(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Write an error nobody foresaw: one line, the traceback only with `--debug`."""
    if debug:
        traceback.print_exception(error)
    return tell(
        f"{type(error).__name__}: {error}" if str(error) else type(error).__name__,
        exit_code=1,
        kind=type(error).__name__,
        hint="this is a fault in stella itself; run the same command with --debug and report what it prints",
        as_json=as_json,
    )
