"""The runbook's rotation with a node of replayed events: stop, archive, verify, clean up, go on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.system.node import free_port


class Demo:
    """A demonstration node in a folder of its own: it observes nothing of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.evidence = folder / "evidence"
        self.config = folder / "stellaops.yaml"
        signals = {
            "bus": {"port": free_port()},
            "metrics": {"port": free_port()},
            "rotation": {"max_size_mb": 0.005},
        }
        self.config.write_text(yaml.safe_dump({"signals": signals}))

    def stella(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stella_cli", "signals", *words]
        command += ["--config", str(self.config), "--target", str(self.evidence)]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)

    def good(self, *words: str) -> str:
        done = self.stella(*words)
        assert 0 == done.returncode, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def signed(self) -> int:
        return len(list(self.evidence.glob("*.dsse.json")))

    def until_signed(self, count: int) -> None:
        """Wait until so many chunks are signed; the recording is enough for three."""
        deadline = time.monotonic() + 30
        while self.signed() < count:
            assert time.monotonic() < deadline, f"only {self.signed()} chunks are signed"
            time.sleep(0.1)


@pytest.mark.slow
def test_the_rotation_of_the_runbook(tmp_path: Path) -> None:
    """Each step as it is written there; before and after, and while the node runs, the chain verifies."""
    demo = Demo(tmp_path)
    demo.good("start", "--demo", "--detach")
    try:
        demo.until_signed(3)
        # While it runs: the signer records the note within moments.
        said = demo.good("cleanup", "--keep-chain-state", "--older-than", "0m")
        assert "removed the lines of" in said
        assert "✓ VALID" in demo.good("verify-chain", str(demo.evidence))
        # 1. Stop   2. Archive   3. Verify the archive   5. Clear old evidence   6. Restart
        demo.good("stop", "--reason", "disk replacement")
        archive = f"evidence-{time.strftime('%Y%m%d')}.tar.gz"
        tar = ["tar", "-czf", archive, str(demo.evidence)]
        subprocess.run(tar, cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
        assert "✓ VALID" in demo.good("verify-chain", archive)
        before = demo.signed()
        demo.good("cleanup", "--keep-chain-state", "--older-than", "0m")
        assert before + 1 == demo.signed()
        demo.good("start", "--demo", "--detach")
    finally:
        demo.stella("stop")
    report = json.loads(demo.good("verify-chain", str(demo.evidence), "--format", "json"))
    assert (True, "complete") == (report["valid"], report["state"])
    assert report["archived"]["chunks"] >= 2
    kinds = [told["note"]["kind"] for told in report["notes"]]
    assert {"cleanup", "planned_gap"} == set(kinds)
    assert [] == list((tmp_path / "state" / "notes").iterdir())
