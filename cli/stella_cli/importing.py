"""`stella signals import`: an export is checked and put in place on the machine that verifies."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from stella_cli import settings, verifying
from stella_shared import clock
from stella_shared.errors import BadAnswer, NotFound, NotPermitted, UsageError
from stella_shared.evidence import importing, keys

_RUNBOOK = "procedure-air-gap-evidence-export"


def run(
    archive: str, to: str, *, carried: str | None, given: list[str], config: str | None, target: str | None
) -> None:
    """Check the archive and put its evidence in place, or join it to what is there.

    Keys that are named are remembered beside the evidence, so that verify-chain knows them from then on.
    """
    chosen = settings.load(config, target)
    place = Path(to).absolute()
    beside = place.parent / "state"
    if place == Path(chosen.signals.output_directory):
        raise UsageError(
            f"{place} is the place of a node's own evidence", hint="choose another place: --to DIR", runbook=_RUNBOOK
        )
    if (beside / "keys" / keys.SIGNING_KEY).exists():
        raise UsageError(
            f"{place} lies beside a node's own state ({beside}), where the import would remember keys and the end",
            hint=f"choose a place with a folder of its own: --to {place.parent / 'imported' / place.name}",
            runbook=_RUNBOOK,
        )
    named = {verifying.key_id(key) for key in given}
    trusted = named or _known(beside) | _known(chosen.state)
    if not trusted:
        raise UsageError(
            "no key is trusted here, so nobody vouches for the archive",
            hint="name the node's key: --key sha256:… (`stella signals init` on the node shows it)",
            runbook=_RUNBOOK,
        )
    with verifying.progress_bar() as progress:
        done = importing.take_in(Path(archive), place, trusted=trusted, carried=_carried(carried), progress=progress)
    if named:
        _remember(beside, named)
    report = done.report
    click.echo(f"{'joined to' if done.joined else 'imported to'} {place}")
    click.echo(f"chunks {report.first} to {report.last} of chain {report.chain_id}, node {report.node}: {report.state}")
    click.echo(f"check: stella signals verify-chain --offline {place}")


def _known(state: Path) -> set[str]:
    """Return the keys a state directory trusts; none when it is not ours to read."""
    try:
        return set(keys.load_trusted(state))
    except NotPermitted:
        return set()


def _carried(path: str | None) -> importing.Carried | None:
    if path is None:
        return None
    try:
        return importing.read_carried(Path(path).read_bytes())
    except FileNotFoundError:
        raise NotFound(f"no manifest at {path}") from None
    except OSError as e:
        raise NotPermitted(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise BadAnswer(
            f"{path}: {e}", hint="make it on the node: stella signals manifest ARCHIVE > manifest.json"
        ) from None


def _remember(state: Path, named: set[str]) -> None:
    """Add keys to what is trusted beside imported evidence."""
    known = keys.load_trust(state)
    now = clock.utc_text(time.time_ns())
    added = [keys.TrustedKey(key, keys.ALGORITHM, now) for key in sorted(named - {k.key_id for k in known.keys})]
    if not added:
        return
    try:
        for directory in (state, state / "keys"):
            directory.mkdir(mode=0o700, exist_ok=True)
        keys.save_trust(state, msgspec.structs.replace(known, keys=[*known.keys, *added]))
    except OSError as e:
        raise NotPermitted(
            f"{e.filename or state}: {e.strerror}; the evidence is imported, its key is not remembered",
            hint="give verify-chain the key: --key",
        ) from None
