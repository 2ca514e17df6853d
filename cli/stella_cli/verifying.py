"""`stella signals verify-chain`: the evidence package's verifier, its answer shown.  No network, ever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from stella_cli import settings
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, NotFound, NotPermitted, UsageError
from stella_shared.evidence import keys as evidence_keys
from stella_shared.evidence.report import ChainReport, encode_report, render_text
from stella_shared.evidence.store import HEAD
from stella_shared.evidence.verify import verify_chain


def run(
    path: Path,
    *,
    config: str | None,
    target: str | None,
    keys: list[str],
    head: str | None,
    verbose: bool,
    as_json: bool,
) -> int:
    """Print the answer about `path`; return the exit code: 0 valid, 1 invalid.

    `head` names a pinned end; without it the node's own evidence is compared with the node's head.json.
    """
    trusted, own_head = _trust(path, config, target, keys)
    with progress_bar() as progress:
        report = verify_chain(
            path,
            trusted_keys=trusted,
            head=Path(head) if head else own_head,
            progress=progress,
            own=own_head is not None,
        )
    if as_json:
        sys.stdout.buffer.write(encode_report(report))
    else:
        first, _, rest = render_text(report, verbose=verbose).partition("\n")
        click.secho(first, fg="green" if report.valid else "red", bold=True)
        click.echo(rest, nl=False)
    return 0 if report.valid else 1


def _trust(path: Path, config: str | None, target: str | None, keys: list[str]) -> tuple[set[str] | None, Path | None]:
    """Return the keys to trust and the head to compare with; None asks the state beside the evidence."""
    if keys:
        return {key_id(key) for key in keys}, None
    chosen = settings.load(config, target)
    own = path.absolute() == Path(chosen.signals.output_directory)
    beside = path.is_dir() and (path.absolute().parent / "state" / "keys" / evidence_keys.TRUSTED).exists()
    if beside and not (own and chosen.state != path.absolute().parent / "state"):
        return None, None
    try:
        known = set(evidence_keys.load_trusted(chosen.state))
    except NotPermitted:
        known = set()
    # An archive or a copy may well end before this node's newest chunk: only its own directory must not.
    head = chosen.state / HEAD
    return (known or None), (head if own and known and head.exists() else None)


def own_chain(chosen: Settings) -> ChainReport:
    """Return the report about this node's own evidence.  Raises `BadAnswer` unless it is valid."""
    evidence = Path(chosen.signals.output_directory)
    if not evidence.is_dir():
        raise NotFound(f"no evidence at {evidence}", hint="run: stella signals init")
    trusted = set(evidence_keys.load_trusted(chosen.state))
    head = chosen.state / HEAD
    with progress_bar() as progress:
        found = verify_chain(evidence, trusted_keys=trusted, head=head if head.exists() else None, progress=progress)
    if not found.valid:
        first = found.faults[0]
        at = f" at chunk {first.chunk}" if first.chunk is not None else ""
        raise BadAnswer(
            f"the chain in {evidence} does not verify: broken{at}: {first.message} ({first.code})",
            hint=f"stella signals verify-chain {evidence} --verbose shows every fault",
            runbook="issue-evidence-chain-verification-failure",
        )
    return found


def key_id(text: str) -> str:
    """Return the key id that `--key` names: a fingerprint, or that of a PEM file."""
    name = text.removeprefix("sha256:").lower()
    if len(name) == 64 and set(name) <= set("0123456789abcdef"):
        return name
    try:
        pem = Path(text).read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"--key {text} is neither sha256:<64 hex digits> nor a file",
            hint="`stella signals init` shows a node's fingerprint",
        ) from None
    except OSError as e:
        raise NotPermitted(f"--key {text}: {e.strerror}") from None
    try:
        return evidence_keys.key_id(evidence_keys.load_public(pem))
    except ValueError as e:
        raise UsageError(f"--key {text}: {e}") from None


@contextmanager
def progress_bar(doing: str = "checking", things: str = "chunks") -> Iterator[Callable[[int, int], None] | None]:
    """Give what draws a bar on stderr; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(things),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
