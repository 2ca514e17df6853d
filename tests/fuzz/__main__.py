"""`python -m tests.fuzz [--seconds N] [NAME …]`: fuzzes each in turn, in bounds of time and memory.

    python -m tests.fuzz --one NAME FOLDER [OPTION …]    one fuzzer, in this process, with libFuzzer's options

An input that crashes, hangs, takes too much memory or is accepted against the rules is left in `fuzz-findings/`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("bundle", "statement", "ledger", "archive", "checkpoint", "chain", "timestamp")
RSS_MIB = 1024
#: For one input.
TIMEOUT_SECONDS = 20


def one(name: str, folder: Path, options: list[str]) -> None:
    """Fuzz in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["stella_shared"]):
        module = importlib.import_module(f"tests.fuzz.fuzz_{name}")
    atheris.Setup([sys.argv[0], *options], module.target(folder))
    atheris.Fuzz()


def run(name: str, folder: Path, seconds: int, findings: Path) -> tuple[int, bool]:
    """Fuzz in a process of its own; return how many inputs were tried, and whether all was well."""
    corpus = folder / "corpus" / name
    command = [
        sys.executable, "-m", "tests.fuzz", "--one", name, str(folder), str(corpus),
        f"-max_total_time={seconds}", f"-rss_limit_mb={RSS_MIB}", f"-timeout={TIMEOUT_SECONDS}",
        f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", "-max_len=65536",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds * 3 + 120, check=False
    )
    text = done.stdout.decode("utf-8", "replace")
    found = re.findall(r"stat::number_of_executed_units: +(\d+)", text) or re.findall(r"^#(\d+)", text, re.M)
    if done.returncode:
        sys.stdout.write(text[-6000:])
    return int(found[-1]) if found else 0, done.returncode == 0


def main() -> int:
    """Fuzz each in turn."""
    parser = argparse.ArgumentParser(description="Fuzzes what reads strangers' documents.")
    parser.add_argument("--seconds", type=int, default=60, help="for each")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all without one")
    options = parser.parse_args()
    from tests.fuzz import known

    findings = ROOT / "fuzz-findings"
    findings.mkdir(exist_ok=True)
    bad = tried = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        known.make(Path(folder))
        for name in options.names or NAMES:
            began = time.monotonic()
            count, well = run(name, Path(folder), options.seconds, findings)
            tried, bad = tried + count, bad + (not well)
            seconds = time.monotonic() - began
            print(
                f"{name:<12} {count:>9} inputs in {seconds:>4.0f} s   {'' if well else 'FOUND SOMETHING'}", flush=True
            )
    print(f"{tried} inputs, {bad} of {len(options.names or NAMES)} found something")
    if not bad:
        findings.rmdir()
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    sys.exit(main())
