"""Asks a public service whether the pinned packages have known vulnerabilities: `python deploy/audit.py`.

Exit codes: 0 asked, none known; 1 asked, and these are known; 10 could not ask, so nothing is known.  It sends the
names and versions of requirements.lock to OSV (https://osv.dev), or to the one at --service, and needs a way there.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

LOCK = Path(__file__).parents[1] / "requirements.lock"
OSV = "https://api.osv.dev/v1/query"
NOT_ASKED = 10
SECONDS = 5


def reachable(url: str) -> str:
    """Return "" when something listens where `url` says, else why not.  Through a proxy only the question can tell."""
    parts = urlsplit(url)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return ""
    try:
        address = (parts.hostname or "", parts.port or {"http": 80}.get(parts.scheme, 443))
        socket.create_connection(address, SECONDS).close()
    except OSError as e:
        return e.strerror or str(e)
    return ""


def ask(service: str, lock: Path) -> tuple[list[str], int] | str:
    """Return the vulnerabilities, a line each, and how many packages were asked about; or why there is no answer."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        options = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", str(SECONDS))
        options += ("--cache-dir", scratch, "-f", "json", "-o", str(answer))
        command = ("pip_audit", *options, "-s", "osv", "--osv-url", service, "-r", str(lock))
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        # It ends with 1 for a vulnerability and for a service that does not answer; only the first leaves an answer.
        if not answer.exists() or not answer.stat().st_size:
            said = done.stderr.strip().splitlines()
            return said[-1] if said else f"pip-audit ended with {done.returncode}"
        packages = json.loads(answer.read_bytes())["dependencies"]
    passed_over = [package["name"] for package in packages if "skip_reason" in package]
    if passed_over or not packages:
        return f"it was not told of {', '.join(passed_over) or 'any package'}"
    found = []
    for package in packages:
        for one in package["vulns"]:
            fixed = ", ".join(one["fix_versions"]) or "no release"
            found.append(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    return found, len(packages)


def main() -> int:
    """Ask, and say what the answer is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--service", default=OSV, metavar="URL", help="where OSV's API answers")
    parser.add_argument("--lock", type=Path, default=LOCK, metavar="FILE", help="the pinned packages")
    given = parser.parse_args()
    why = reachable(given.service)
    answer = why or ask(given.service, given.lock)
    if isinstance(answer, str):
        print(f"NOT AUDITED: {given.service} could not be asked: {answer}", file=sys.stderr)
        print("  Whether the packages have known vulnerabilities is not known.", file=sys.stderr)
        return NOT_ASKED
    found, packages = answer
    print(*found, f"{packages} packages asked about, {len(found)} known vulnerabilities", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
