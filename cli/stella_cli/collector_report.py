"""Asking the collector's own program for a report: the one that may look into the kernel.

The command imports no service; it runs `python -m stella_collector` with a flag, and reads JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from stella_shared.errors import BrokenPromise, NotFound, NotPermitted, StellaError, TryAgain, UsageError

LIMIT_SECONDS: Final = 60.0
_BY_EXIT_CODE: Final[dict[int, type[StellaError]]] = {
    e.exit_code: e for e in (UsageError, NotPermitted, NotFound, TryAgain)
}


def ask(config: Path | None, *flags: str) -> Any:
    """Return the report that the collector prints for `flags`, with the configuration in a file or the defaults.

    Raises the error that its exit code stands for.
    """
    command = [sys.executable, "-m", "stella_collector", *flags]
    if config is not None:
        command += ["--config", str(config)]
    try:
        done = subprocess.run(command, capture_output=True, env=dict(os.environ), timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise TryAgain(f"the collector did not report within {LIMIT_SECONDS:.0f} s") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        pass
    said = done.stderr.decode(errors="replace").strip().splitlines()
    error = next((line for line in said if line.startswith("Error:")), said[-1] if said else "")
    hint = next((line for line in said if line.startswith("Hint:")), "")
    message = error.removeprefix("Error:").strip() or f"exit code {done.returncode}"
    kind = _BY_EXIT_CODE.get(done.returncode, BrokenPromise)
    raise kind(f"the collector gave no report: {message}", hint=hint.removeprefix("Hint:").strip())
