"""`stella signals inspect`: what was seen of an image or a container, and what its absence means."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from stella_cli import verifying
from stella_cli.verifying import NamedTrust


def run(
    asked: str,
    *,
    evidence: str | None,
    config: str | None,
    target: str | None,
    named: NamedTrust,
    top: int,
    as_json: bool,
) -> int:
    """Print the answer; return the exit code: 0 when the evidence verifies, else 1."""
    from stella_cli import settings
    from stella_cli.inspection import answer, rendering, subject

    who = subject.parse(asked)
    path = Path(evidence or settings.load(config, target).signals.output_directory)
    trust, head = verifying.trust_of(path, config, target, named)
    with verifying.progress_bar("verifying") as checked, verifying.progress_bar("searching") as scanned:
        found = answer.inspect(
            path,
            who,
            trust=trust,
            head=head,
            own=head is not None,
            top=top,
            verifying=checked,
            scanning=scanned,
        )
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    else:
        rendering.show(found)
    return 0 if found.evidence.valid else 1
