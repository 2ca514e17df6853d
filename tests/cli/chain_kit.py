"""A node's chain made by the real store, and the real command with the real signer's process on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evidence"))

from chain_maker import Node, small_chain  # noqa: E402
from export_maker import months  # noqa: E402

__all__ = ["Node", "Site", "months", "small_chain"]


def environment() -> dict[str, str]:
    """Return this process's environment without anything of a node in it."""
    return {k: v for k, v in os.environ.items() if not k.startswith("STELLA_") and k != "PYTHONPATH"}


class Site:
    """A folder with a configuration, a chain of four chunks that ended in 2023, and no node running."""

    def __init__(self, folder: Path, *, chain: bool = True, **signals: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.evidence = folder / "evidence"
        self.state = folder / "state"
        self.config = folder / "stellaops.yaml"
        content = {"output_directory": str(self.evidence), "node": "node-a", **signals}
        self.config.write_text(yaml.safe_dump({"signals": content}))
        if chain:
            self.node = small_chain(folder)

    def stella(self, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `stella signals …` with this folder's configuration, to its end."""
        command = [sys.executable, "-m", "stella_cli", "signals", *map(str, words)]
        env = environment() | {"STELLA_CONFIG": str(self.config)}
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)

    def good(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.stella(*words, cwd=cwd)
        assert 0 == done.returncode, done.stdout + done.stderr
        return done.stdout

    def report(self, path: Path | None = None, *words: str) -> dict[str, Any]:
        """Return the command's own report of a chain."""
        return dict(json.loads(self.stella("verify-chain", path or self.evidence, "--format", "json", *words).stdout))

    def statuses(self) -> list[str]:
        return [str(chunk["status"]) for chunk in self.report()["chunks"]]
