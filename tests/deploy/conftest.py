"""One engine for the whole folder: what is built for one test serves the others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import engine as kit
from tests.deploy.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine, not running, whose data root holds the base image.  What it lacks is told and skips the test."""
    if reason := kit.lacking():
        pytest.skip(f"no container engine of our own: {reason}")
    kit.fetch()
    # Not /tmp, which may be a file system that overlayfs cannot stand on.
    with tempfile.TemporaryDirectory(prefix="stella-engine-", dir="/var/tmp") as folder:
        engine = Engine(Path(folder))
        with engine.running(bridges=False):
            engine.import_base()
        yield engine
