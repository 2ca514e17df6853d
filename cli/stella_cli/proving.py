"""`stella signals prove` and `verify-proof`: proofs of single lines, written and checked.  No network, ever."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final

import click
import msgspec

from stella_cli import settings
from stella_cli.console import printable
from stella_cli.verifying import NamedTrust, named_trust, root_file
from stella_shared.errors import NotFound, NotPermitted, UsageError
from stella_shared.evidence import proof
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.lines import MAX_LINE_BYTES
from stella_shared.evidence.proof import Proof, Proven
from stella_shared.evidence.prover import LineOf, Place, Prover, Wanted, place_of
from stella_shared.evidence.trusted import node_trust
from stella_shared.evidence.vouching import Trust

_STDIN: Final = "-"
_STDIN_LINES_MAX: Final = 10_000
_PLACE = re.compile(r"([0-9A-Za-z._-]{1,64})/([0-9]{1,9})/([0-9]{1,20})")
_LINE_OF = re.compile(r"([0-9]{1,12}):([0-9]{1,12})")


def prove(events: list[str], evidence: Path, *, output: str | None, directory: str | None) -> None:
    """Write a proof of each event: one to stdout or `output`, several into `directory`."""
    if output is not None and directory is not None:
        raise UsageError("--output and --output-directory exclude each other")
    wanted = [one for event in events for one in _wanted(event)]
    if not wanted:
        raise UsageError("stdin holds no line", hint="stella signals prove --help")
    if output is not None and len(wanted) > 1:
        raise UsageError(f"--output is for one proof, these are {len(wanted)}", hint="use --output-directory")
    proofs = Prover(evidence).prove(wanted)
    try:
        if output is not None:
            Disk().put(Path(output), proof.encode(proofs[0]), 0o644)
        elif directory is None and len(proofs) == 1:
            sys.stdout.buffer.write(proof.encode(proofs[0]))
        else:
            _put_all(proofs, Path(directory or "."))
    except PermissionError as e:
        raise NotPermitted(f"{e.filename}: {e.strerror}", hint="choose another place with --output") from None
    except FileNotFoundError as e:
        raise NotFound(f"{e.filename}: {e.strerror}", hint="make the directory first") from None


def _put_all(proofs: list[Proof], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for one in proofs:
        path = directory / f"proof-{one.chunk:06d}-{one.leaf_index + 1}.json"
        Disk().put(path, proof.encode(one), 0o644)
        click.echo(str(path))


def _wanted(event: str) -> list[Wanted]:
    if event == _STDIN:
        return _wanted_of(sys.stdin.buffer)
    if match := _PLACE.fullmatch(event):
        return [Wanted(Place(match[1], int(match[2]), int(match[3])))]
    if match := _LINE_OF.fullmatch(event):
        return [Wanted(LineOf(int(match[1]), int(match[2])))]
    raise UsageError(
        f"{event!r} names no event", hint="RUN/LANE/SEQ as they stand in its line, CHUNK:LINE, or - for lines on stdin"
    )


def _wanted_of(file: BinaryIO) -> list[Wanted]:
    wanted: list[Wanted] = []
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        line = line.removesuffix(b"\n")
        if not line:
            continue
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
            wanted.append(Wanted(place_of(line), line))
        except ValueError as e:
            raise UsageError(f"stdin, line {number}: {e}", hint="give evidence lines as they are") from None
        if len(wanted) > _STDIN_LINES_MAX:
            raise UsageError(f"more than {_STDIN_LINES_MAX} lines", hint="prove them in several goes")
    return wanted


class _Answer(msgspec.Struct, frozen=True):
    """One proof's answer, as `--format json` shows it."""

    file: str
    valid: bool
    reason: str
    proven: Proven | None


def verify(files: list[str], *, config: str | None, target: str | None, named: NamedTrust, as_json: bool) -> int:
    """Print what each proof proves; return the exit code: 0 all valid, 1 one is not."""
    trust = named_trust(named) or _node_trust(config, target, named)
    answers = [_answer(name, trust) for name in files]
    valid = all(answer.valid for answer in answers)
    if as_json:
        report = {"format": 1, "valid": valid, "trusted_keys": sorted(trust.keys), "proofs": answers}
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    else:
        for answer in answers:
            _show(answer, any_trusted=trust.anybody)
    return 0 if valid else 1


def _node_trust(config: str | None, target: str | None, named: NamedTrust) -> Trust:
    """Return whom this node trusts, with the caller's trusted root if one is named."""
    known = node_trust(settings.load(config, target).state)
    return msgspec.structs.replace(known, root=root_file(named.trusted_root)) if named.trusted_root else known


def _answer(name: str, trust: Trust) -> _Answer:
    data = _read(name)
    try:
        return _Answer(name, True, "", proof.verify(data, trust))
    except ValueError as e:
        return _Answer(name, False, str(e), None)


def _read(name: str) -> bytes:
    try:
        if name == _STDIN:
            return sys.stdin.buffer.read(proof.MAX_PROOF_BYTES + 1)
        with Path(name).open("rb") as file:
            return file.read(proof.MAX_PROOF_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"no file {name}", hint="stella signals prove writes proofs") from None
    except OSError as e:
        raise NotPermitted(f"{name}: {e.strerror}", hint="name a file that you may read") from None


def _show(answer: _Answer, *, any_trusted: bool) -> None:
    proven = answer.proven
    state = "✗ INVALID" if proven is None else "✓ VALID"
    click.secho(f"Proof Status: {state}", fg="red" if proven is None else "green", bold=True)
    rows: list[tuple[str, Any]] = [("File", answer.file)]
    if proven is None:
        rows.append(("Error", answer.reason))
        if not any_trusted:
            rows.append(("Hint", "name the key you trust: --key sha256:<fingerprint>"))
    else:
        rows += [
            ("Event", proven.line),
            ("Place", f"line {proven.line_number} of {proven.lines} of chunk {proven.chunk}"),
            ("Chain", f"{proven.chain_id} of node {proven.node}"),
            ("Window", f"{proven.start} … {proven.end}, by the node's clock"),
            _signer(proven),
            ("Log", _log(proven)),
        ]
        if proven.trusted_time:
            rows.append(("Seen", f"{proven.trusted_time}, by a log or timestamp authority that is trusted"))
    for name, value in rows:
        click.echo(f"  {name}: {printable(str(value))}")


def _signer(proven: Proven) -> tuple[str, str]:
    who = proven.identity
    return ("Identity", f"{who.subject}, by {who.issuer}") if who else ("Key", f"sha256:{proven.key_id}")


def _log(proven: Proven) -> str:
    if proven.log:
        return f"{proven.log}, entry {proven.log_index}"
    if proven.unjudged:
        return "not judged: name a trusted root with --trusted-root"
    return "none: that it was signed at that time is the key owner's word alone"
