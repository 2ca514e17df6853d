"""Services started one by one, as units and containers start them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SERVICES = ("collector", "enricher", "signer", "gateway")


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_says_in_words_and_by_its_exit_code_that_its_configuration_is_wrong(
    tmp_path: Path, service: str
) -> None:
    """Exit code 2, by which a unit knows that a new start would not help; and no traceback."""
    file = tmp_path / "stellaops.yaml"
    file.write_text("signals: {ring_bufer_size: 1}\n")
    command = [sys.executable, "-P", "-m", f"stella_{service}", "--config", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert 2 == done.returncode, done.stderr
    assert "did you mean ring_buffer_size?" in done.stderr
    assert "Traceback" not in done.stderr
