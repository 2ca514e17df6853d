"""One engine for the whole folder, with everything built that its tests run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import engine as kit
from tests.deploy.engine import Engine

PREPARE_SECONDS = 900
#: What the engine's folder may take, and from how much free memory on it is kept there: to write and remove thousands
#: of small files on a disk takes longer than the tests.
SCRATCH_BYTES = 6 << 30
FREE_BYTES = 2 * SCRATCH_BYTES


class Preparation:
    """A folder, and the process that makes an engine's images in it."""

    def __init__(self) -> None:
        # Not /tmp, which may be a file system that overlayfs cannot stand on.
        self.folder = Path(tempfile.mkdtemp(prefix="stella-engine-", dir="/var/tmp"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SCRATCH_BYTES},mode=0711", "stella-engine", self.folder]
        # Where that is not permitted, the engine's own failure says so to the tests that need it.
        self._in_memory = free_bytes() > FREE_BYTES and not subprocess.run(mount, check=False).returncode
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by `remove`
        # It takes the time that nobody else wants.
        command = ["nice", "-n", "19", sys.executable, "-m", "tests.deploy.prepare", self.folder]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, cwd=Path(__file__).parents[2])

    def finished(self) -> Engine:
        """Return the engine, not running, whose data root holds the images."""
        if self._process.wait(PREPARE_SECONDS):
            self._log.seek(0)
            raise AssertionError(self._log.read()[-6000:])
        return Engine(self.folder)

    def remove(self) -> None:
        """End it, and remove all that it has made."""
        self._process.terminate()
        self._process.wait(60)
        self._log.close()
        if self._in_memory:
            kit.run("umount", "--lazy", self.folder)
        shutil.rmtree(self.folder)


PREPARATION = pytest.StashKey[Preparation]()


def free_bytes() -> int:
    """Return how much memory could be had without pushing anything out."""
    rows = dict(row.split(":") for row in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin at once with what takes two minutes, when a test will ask for it."""
    wanted = any("engine" in item.fixturenames and Path(__file__).parent in item.path.parents for item in session.items)  # type: ignore[attr-defined]
    if wanted and not session.config.option.collectonly and not kit.lacking():
        session.config.stash[PREPARATION] = Preparation()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave nothing, however far the tests have come."""
    if PREPARATION in session.config.stash:
        session.config.stash[PREPARATION].remove()


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[Engine]:
    """An engine, not running, whose data root holds our images.  What the machine lacks is told and skips the test."""
    if reason := kit.lacking():
        pytest.skip(f"no container engine of our own: {reason}")
    yield pytestconfig.stash[PREPARATION].finished()
