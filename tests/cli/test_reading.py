"""`stella signals lines`: what was recorded, as it was recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "evidence"))

from chain_kit import Site  # noqa: E402
from chain_maker import Source, one  # noqa: E402


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a node with four closed chunks and two lines in the open one."""
    made = Site(tmp_path)
    store = made.node.open()
    store.commit(*one(Source(made.node.name, "f" * 16, since_ns=9000).batch({0: 2})))
    store.release()
    return made


def test_lines_of_one_chunk_of_a_range_and_of_all(site: Site) -> None:
    """In the order of the chunks, and the open one's last."""
    second, third = site.node.lines(2).decode(), site.node.lines(3).decode()
    assert second == site.good("lines", "2")
    assert second + third == site.good("lines", "2-3") == site.good("lines", "3", "2")
    everything = site.good("lines")
    assert everything.startswith(second + third)
    assert 2 == everything.count('"run":"ffffffffffffffff"')


def test_a_chunk_without_lines_is_no_fault(site: Site) -> None:
    """The genesis chunk is empty."""
    assert "" == site.good("lines", "1")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["99"], 4, "holds no lines of chunk 99"),
        (["98-99"], 4, "holds no lines of chunk 98 to 99"),
        (["3-2"], 2, "'3-2' is no chunk"),
        (["000002.ndjson.zst"], 2, "a chunk's index as 42"),
        (["--evidence", "/nowhere"], 4, "no evidence at /nowhere"),
    ],
)
def test_what_is_not_there_is_named(site: Site, arguments: list[str], code: int, said: str) -> None:
    """Wrong use is 2, what is not there is 4."""
    done = site.stella("lines", *arguments)
    assert code == done.returncode
    assert said in done.stderr


def test_a_damaged_chunk_gives_what_is_whole_and_ends_with_1(site: Site) -> None:
    """What stands before the damage is printed; the file is named."""
    path = site.node.file(3, "ndjson.zst")
    path.write_bytes(path.read_bytes() + b"x" * 100)
    done = site.stella("lines", "2-3")
    assert (1, site.node.lines(2).decode()) == (done.returncode, done.stdout[: len(site.node.lines(2))])
    assert "000003.ndjson.zst: what is there is no zstd frame" in done.stderr


def test_the_open_chunk_may_be_half_written(site: Site) -> None:
    """A frame that the signer is writing at this moment is not there yet, and is no fault."""
    path = next(site.evidence.glob("*.open.ndjson.zst"))
    path.write_bytes(path.read_bytes()[:-3])
    assert '"run":"ffffffffffffffff"' not in site.good("lines")
