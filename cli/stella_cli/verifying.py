"""`stella signals verify-chain`: the evidence package's verifier, its answer shown.  No network, ever."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from stella_cli import settings
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, NotFound, NotPermitted, UsageError
from stella_shared.evidence import keys as evidence_keys
from stella_shared.evidence.report import ChainReport, encode_report, render_text
from stella_shared.evidence.store import HEAD
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.trust import TrustRoot
from stella_shared.evidence.transparency.trust import parse as parse_root
from stella_shared.evidence.trusted import node_trust
from stella_shared.evidence.verify import verify_chain
from stella_shared.evidence.vouching import Trust


def run(
    path: Path,
    *,
    config: str | None,
    target: str | None,
    named: NamedTrust,
    head: str | None,
    require_log: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Print the answer about `path`; return the exit code: 0 valid, 1 invalid.

    `head` names a pinned end; without it the node's own evidence is compared with the node's head.json.
    """
    trust, own_head = trust_of(path, config, target, named)
    with progress_bar() as progress:
        report = verify_chain(
            path,
            trust=trust,
            head=Path(head) if head else own_head,
            progress=progress,
            own=own_head is not None,
            require_log=require_log,
        )
    if as_json:
        sys.stdout.buffer.write(encode_report(report))
    else:
        first, _, rest = render_text(report, verbose=verbose).partition("\n")
        click.secho(first, fg="green" if report.valid else "red", bold=True)
        click.echo(rest, nl=False)
    return 0 if report.valid else 1


class NamedTrust(msgspec.Struct, frozen=True):
    """Whom the caller names: keys, identities of keyless signers, a file with a trusted root."""

    keys: list[str] = []
    identities: list[Identity] = []
    trusted_root: str = ""

    @property
    def anybody(self) -> bool:
        """Whether a signer is named.  A trusted root alone names none."""
        return bool(self.keys or self.identities)


def trust_of(path: Path, config: str | None, target: str | None, named: NamedTrust) -> tuple[Trust | None, Path | None]:
    """Return whom to trust and the head to compare with; None asks the state beside the evidence."""
    if trust := named_trust(named):
        return trust, None
    root = root_file(named.trusted_root) if named.trusted_root else None
    chosen = settings.load(config, target)
    own = path.absolute() == Path(chosen.signals.output_directory)
    state = path.absolute().parent / "state"
    beside = path.is_dir() and (state / "keys" / evidence_keys.TRUSTED).exists()
    beside = beside and not (own and chosen.state != state)
    if beside and root is None:
        return None, None
    try:
        known = node_trust(state if beside else chosen.state)
    except NotPermitted:
        known = Trust()
    trust = Trust(known.keys, known.identities, root or known.root)
    # An archive or a copy may well end before this node's newest chunk: only its own directory must not.
    head = (state if beside else chosen.state) / HEAD
    return trust, (head if (own or beside) and known.anybody and head.exists() else None)


def named_trust(named: NamedTrust) -> Trust | None:
    """Return the trust that the caller names, None when no signer is named."""
    if not named.anybody:
        return None
    root = root_file(named.trusted_root) if named.trusted_root else None
    return Trust({key_id(key): "" for key in named.keys}, frozenset(named.identities), root)


def root_file(file: str) -> TrustRoot:
    """Return the trusted root in a file that the caller names."""
    try:
        return parse_root(Path(file).read_bytes())
    except FileNotFoundError:
        raise NotFound(f"--trusted-root {file}: no such file") from None
    except OSError as e:
        raise NotPermitted(f"--trusted-root {file}: {e.strerror}") from None
    except ValueError as e:
        raise UsageError(f"--trusted-root {file}: {e}", hint="it is a Sigstore trusted_root.json") from None


def own_chain(chosen: Settings) -> ChainReport:
    """Return the report about this node's own evidence.  Raises `BadAnswer` unless it is valid."""
    evidence = Path(chosen.signals.output_directory)
    if not evidence.is_dir():
        raise NotFound(f"no evidence at {evidence}", hint="run: stella signals init")
    head = chosen.state / HEAD
    with progress_bar() as progress:
        found = verify_chain(
            evidence, trust=node_trust(chosen.state), head=head if head.exists() else None, progress=progress
        )
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
def progress_bar(doing: str = "checking", things: str = "") -> Iterator[Callable[[int, int], None] | None]:
    """Give what draws a bar on stderr, counting `things`, else bytes; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = (MofNCompleteColumn(), TextColumn(things)) if things else (DownloadColumn(), TransferSpeedColumn())
    columns = (
        TextColumn(doing),
        BarColumn(),
        *counted,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
