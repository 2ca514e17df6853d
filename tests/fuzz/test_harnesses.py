"""The fuzzers' own checks hold for real documents, and for a few changes to them; `make fuzz` does this for long."""

from __future__ import annotations

import importlib
import random
import tempfile
from pathlib import Path

import pytest

from tests.fuzz import known
from tests.fuzz.__main__ import NAMES

#: The library warns of certificates that it will refuse one day; it refuses or reads them here, as it likes.
pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the chains and the seeds once."""
    folder = tmp_path_factory.mktemp("fuzz")
    known.make(folder)
    return folder


def test_there_is_a_harness_for_each_name() -> None:
    """The list that `make fuzz` goes through is the files that are there."""
    assert sorted(NAMES) == sorted(
        path.stem.removeprefix("fuzz_") for path in Path(__file__).parent.glob("fuzz_*.py")
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_keeps_the_rules(made: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seed, and each with a byte changed, a part cut out, or two joined."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    one = importlib.import_module(f"tests.fuzz.fuzz_{name}").target(made)
    dice = random.Random(name)
    seeds = [path.read_bytes() for path in sorted((made / "corpus" / name).iterdir()) if path.stat().st_size]
    assert len(seeds) > 5
    one(b"")
    for seed in seeds:
        one(seed)
        at, other = dice.randrange(len(seed)), dice.choice(seeds)
        one(seed[:at] + bytes([seed[at] ^ dice.randint(1, 255)]) + seed[at + 1 :])
        one(seed[:at] + seed[at + dice.randint(1, 64) :])
        one(seed[:at] + other[dice.randrange(len(other)) :])
