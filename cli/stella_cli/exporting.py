"""`stella signals export` and `stella signals manifest`: a part of the chain, signed for, in one file."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
import msgspec

from stella_cli import signer_process, verifying
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, NotPermitted, TryAgain, UsageError
from stella_shared.evidence import export, importing
from stella_shared.evidence.store import places

_SUFFIXES = (".tar.gz", ".tgz")
_RUNBOOK = "procedure-air-gap-evidence-export"


def run(settings: Settings, start: str, end: str, output: str, *, proofs: bool, force: bool) -> None:
    """Write the archive.  Raises `NotFound` when no chunk was open in that time, `BadAnswer` when the chain is bad."""
    target = Path(output)
    if not target.name.endswith(_SUFFIXES):
        raise UsageError(f"--output {output} does not end in {' or '.join(_SUFFIXES)}", runbook=_RUNBOOK)
    if not force:
        _refuse(target)
    asked = export.times(start, end)
    verifying.own_chain(settings)
    words = ["--manifest", "--since", asked.since, "--until", asked.until, *(["--proofs"] if proofs else [])]
    signed = signer_process.run(settings, *words)
    evidence = places(settings.signals).evidence
    with _whole(target, force=force) as out, verifying.progress_bar("packing", "files") as progress:
        try:
            told = export.write(evidence, signed, out, progress).predicate
        except ValueError as e:
            raise BadAnswer(f"the signer's process gave no manifest: {e}") from None
    click.echo(f"chunks {told.first} to {told.last} of chain {told.chain_id}, node {told.node}")
    if told.archived:
        click.echo(f"of {len(told.archived)} of them the lines had been cleaned up: they are not in it")
    if told.pending:
        click.echo(f"{len(told.pending)} of them are in no log")
    click.echo(f"wrote {target} ({target.stat().st_size} bytes)")


def manifest(archive: str) -> None:
    """Print what an archive holds, as JSON, after holding its files against its signed manifest."""
    try:
        told = importing.describe(Path(archive))
    except PermissionError as e:
        raise NotPermitted(f"{e.filename}: {e.strerror}") from None
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")


def _refuse(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} is there already", hint="choose another name, or give --force", runbook=_RUNBOOK)


@contextlib.contextmanager
def _whole(target: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Give a file that becomes `target` when the block ends well, durably, and goes when it does not."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        if force:
            part.rename(target)
        else:
            _name(part, target)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)
    except PermissionError as e:
        raise NotPermitted(f"{e.filename or target}: {e.strerror}", hint="choose another place: --output") from None
    except FileNotFoundError as e:
        raise UsageError(f"{e.filename}: {e.strerror}", hint="make the directory first", runbook=_RUNBOOK) from None
    except OSError as e:
        raise TryAgain(f"{e.filename or target}: {e.strerror}", hint="see whether the disk is full") from None
    finally:
        part.unlink(missing_ok=True)


def _name(part: Path, target: Path) -> None:
    """Give `part` the name `target`; never over a file that came there meanwhile."""
    try:
        os.link(part, target)
    except FileExistsError:
        _refuse(target)
    except OSError as e:
        if e.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A stick's file system knows no links: a look and a rename is what there is.
        _refuse(target)
        part.rename(target)
