"""Submits what is pending, once, and ends: `python -m stella_signer.resubmit --config FILE [--wait SECONDS]`.

The same code as in the running signer, under the same lock: safe beside it, and safe to run twice.
Writes a JSON object a line to standard output after each round: `{"logged":…,"left":…,"rejected":…,"error":…}`.
Exit codes: 0 nothing is left, 1 the log refused some for good, 2 configuration, 10 some are left.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import anyio
import msgspec

from stella_shared import config
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, NotFound, StellaError
from stella_shared.evidence.store import places, read_chain
from stella_signer import trust_config
from stella_signer.outside import Outside
from stella_signer.submission import Round, Submitter


class Progress(msgspec.Struct, frozen=True):
    """What a line says.  Counts are since the command began, but for `left`."""

    logged: int
    left: int
    rejected: int
    error: str


async def resubmit(signals: Signals, wait_seconds: float) -> Progress:
    """Run rounds until nothing is left, or nothing moves for `wait_seconds`."""
    where = places(signals)
    if read_chain(where.evidence) is None:
        raise NotFound(f"no chain in {where.evidence}", hint="run: stella signals init")
    if not config.has_trust_config(signals.rekor):
        raise ConfigError(
            "no transparency log is configured, so there is nothing to submit to",
            hint="set signals.rekor.trust_config, or tuf_url and tuf_root",
        )
    services = trust_config.load(signals.rekor, where.state)
    rekor = signals.rekor
    logged = rejected = 0
    deadline = anyio.current_time() + wait_seconds
    async with Outside() as outside:
        submitter = Submitter(
            where,
            outside,
            services,
            read_url=rekor.read_url,
            every=rekor.submit_every,
            parallel=rekor.parallel_uploads,
        )
        first = True
        while True:
            done: Round = await submitter.round(retry_rejected=first)
            first = False
            logged, rejected = logged + done.logged, rejected + done.rejected
            progress = Progress(logged, done.left, rejected, done.error or (submitter.last_error if rejected else ""))
            sys.stdout.buffer.write(msgspec.json.encode(progress) + b"\n")
            sys.stdout.flush()
            if done.logged:
                deadline = anyio.current_time() + wait_seconds
            if submitter.alarm or not done.left or (done.error and anyio.current_time() >= deadline):
                return progress
            if done.error:
                await anyio.sleep(min(done.after_seconds, max(0.0, deadline - anyio.current_time())))


def main(argv: list[str] | None = None) -> int:
    """Run the command.  Returns the exit code."""
    parser = argparse.ArgumentParser(prog="stella-signer-resubmit", description="Submits what is pending, once.")
    parser.add_argument("--config", type=Path, help="configuration file (defaults without one)")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to go on trying while the log is away")
    options = parser.parse_args(argv)
    try:
        progress = anyio.run(resubmit, config.load(options.config, os.environ), options.wait)
    except StellaError as e:
        sys.stderr.buffer.write(msgspec.json.encode({"error": str(e), "hint": e.hint}) + b"\n")
        return e.exit_code
    return 10 if progress.left else 1 if progress.rejected else 0


if __name__ == "__main__":
    sys.exit(main())
