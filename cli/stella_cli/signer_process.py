"""The signer's own process, started for one errand when no node runs: it has the key, this command has not."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from stella_cli import node_file
from stella_cli.settings import Settings
from stella_shared.errors import (
    BadAnswer,
    BrokenPromise,
    ConfigError,
    NotFound,
    NotPermitted,
    StellaError,
    TryAgain,
    UsageError,
)
from stella_shared.evidence import cleanup, notes
from stella_shared.evidence.records import Note
from stella_shared.evidence.store import SIGNER_LOCK, places, read_chain

LIMIT_SECONDS: Final = 600.0
#: A running signer looks once a second, and closes when no batch waits for an earlier one: a minute at the most.
RECORD_SECONDS: Final = 90.0
_BY_EXIT_CODE: Final[dict[int, type[StellaError]]] = {
    e.exit_code: e for e in (BadAnswer, ConfigError, NotPermitted, NotFound, TryAgain)
}


def run(settings: Settings, *words: str) -> bytes:
    """Run `python -m stella_signer` with these options to its end and return what it printed.

    It runs as the owner of the state directory, so that what it writes is the node's.  Raises what it failed
    with.
    """
    with prepared(settings, "stella_signer", *words) as begun:
        try:
            done: subprocess.CompletedProcess[bytes] = subprocess.run(
                begun.command, capture_output=True, check=False, timeout=LIMIT_SECONDS, **begun.options
            )
        except subprocess.TimeoutExpired:
            raise TryAgain(f"the signer's process did not end within {LIMIT_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace").strip().splitlines()
    start = next((i for i, line in enumerate(said) if line.startswith("stella-signer: ")), -1)
    if start < 0:
        raise BrokenPromise(f"the signer's process ended with {done.returncode}: {said[-1] if said else 'no word'}")
    text, _, hint = "\n".join(said[start:]).removeprefix("stella-signer: ").partition("\n  hint: ")
    raise _BY_EXIT_CODE.get(done.returncode, BrokenPromise)(text, hint=hint)


class Start(msgspec.Struct, frozen=True):
    """How a module of the signer is started: the command line, and options for `subprocess`."""

    command: list[str]
    options: dict[str, Any]


@contextmanager
def prepared(settings: Settings, module: str, *words: str) -> Iterator[Start]:
    """Give what starts `python -m module` of the signer with this command's configuration, as the node's owner."""
    node_file.make_state_directory(settings.state)
    owner = _owner(settings.state)
    with _configuration(settings) as path:
        yield Start(
            # -P: a module in the directory we were called from must never stand in for the signer.
            [sys.executable, "-P", "-m", module, "--config", str(path), *words],
            {
                "stdin": subprocess.DEVNULL,
                "env": {k: v for k, v in os.environ.items() if not k.startswith("STELLA_SIGNALS")},
                "user": owner[0] if owner else None,
                "group": owner[1] if owner else None,
                "extra_groups": [] if owner else None,
            },
        )


def _owner(state: Path) -> tuple[int, int] | None:
    """Return whom to become; None when that is who we are, or when we may not."""
    owner = state.stat()
    return (owner.st_uid, owner.st_gid) if os.geteuid() == 0 and owner.st_uid != 0 else None


@contextmanager
def _configuration(settings: Settings) -> Iterator[Path]:
    """Give a file with the configuration as this command has it: file, environment and flags in one."""
    path = settings.state / "run" / f"errand-{os.getpid()}.yaml"
    path.unlink(missing_ok=True)
    # Readable by the owner of the directory, who may be another user; nobody else gets into the directory.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode({"signals": settings.signals}))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def is_free(settings: Settings) -> bool:
    """Return whether no signer holds the store, and no node is there that would start one."""
    return node_file.running(settings.state) is None and signer_is_away(settings)


def signer_is_away(settings: Settings) -> bool:
    """Return whether no signer holds the store."""
    try:
        with (settings.state / SIGNER_LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    except PermissionError as e:
        raise NotPermitted(f"{e.filename}: {e.strerror}", hint="run as the owner of the node, or as root") from None
    return True


def record(settings: Settings, wanted: list[Note]) -> None:
    """Leave notes for the signer and return when signed chunks record all of them.

    A running signer is waited for; when none runs, one is started that does this and ends.  Raises `TryAgain`
    when it takes too long: the notes are then recorded later, by whichever signer comes next.
    """
    if wanted and not settings.signals.signing.enabled:
        raise UsageError(
            "signing is switched off, so no note can be signed",
            hint="set signals.signing.enabled to true",
            runbook="configuration-reference",
        )
    where = places(settings.signals)
    chain = read_chain(where.evidence)
    if chain is None:
        raise NotFound(f"{where.evidence} holds no chain", hint="run: stella signals init")
    since = 1 + cleanup.newest_signed(where)
    for note in wanted:
        notes.put(where, chain.chain_id, note)
    left = {note.id for note in wanted}
    deadline = time.monotonic() + RECORD_SECONDS
    while left := left - cleanup.signed_with(where, left, since):
        if is_free(settings):
            try:
                run(settings, "--once")
            except TryAgain as e:
                # A node that was just started may have taken the store before us: then it does the work.
                if is_free(settings):
                    raise e from None
            left -= cleanup.signed_with(where, left, since)
            if left and is_free(settings):
                raise BrokenPromise("the signer's process ended well, and the note is in no signed chunk")
        if time.monotonic() > deadline:
            raise TryAgain(
                f"the running signer has not recorded the note after {RECORD_SECONDS:.0f} s",
                hint=f"stella signals health; its log is {settings.state / 'logs' / 'signer.log'}",
                runbook="health-checks",
            )
        time.sleep(0.2)
