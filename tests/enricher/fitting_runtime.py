"""An OCI runtime for tests: takes out of a bundle what this machine cannot grant, then becomes the real runtime.

Without CAP_SYS_RESOURCE nobody may have that capability, raise limits above our own, or lower his oom score;
podman asks for the second by default.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

CAP_SYS_RESOURCE = 24


def may_do_all() -> bool:
    """Return whether we have what is taken out otherwise."""
    lines = Path("/proc/self/status").read_text().splitlines()
    bounding = next(int(line.split()[1], 16) for line in lines if line.startswith("CapBnd"))
    return bool(bounding >> CAP_SYS_RESOURCE & 1)


def fit(process: dict[str, Any]) -> None:
    """Change what a process asks for into what it can have."""
    for names in (process.get("capabilities") or {}).values():
        while "CAP_SYS_RESOURCE" in (names or []):
            names.remove("CAP_SYS_RESOURCE")
    for limit in process.get("rlimits") or []:
        hard = resource.getrlimit(getattr(resource, limit["type"]))[1]
        if hard != resource.RLIM_INFINITY:
            limit["hard"] = min(limit["hard"], hard)
            limit["soft"] = min(limit["soft"], limit["hard"])
    own = int(Path("/proc/self/oom_score_adj").read_text())
    process["oomScoreAdj"] = max(process.get("oomScoreAdj") or own, own)


def asked(arguments: list[str]) -> Path | None:
    """Return the file that says what a process of this call may do."""
    for at, word in enumerate(arguments[:-1]):
        if word in ("--bundle", "-b"):
            return Path(arguments[at + 1], "config.json")
        if word in ("--process", "-p"):
            return Path(arguments[at + 1])
    return None


def main() -> None:
    """Be the runtime `REAL_RUNTIME`."""
    path = asked(sys.argv)
    if path is not None and path.exists() and not may_do_all():
        document = json.loads(path.read_bytes())
        fit(document.get("process", document))
        path.write_text(json.dumps(document))
    os.execvp(os.environ.get("REAL_RUNTIME", "runc"), [sys.argv[0], *sys.argv[1:]])  # noqa: S606


if __name__ == "__main__":
    main()
