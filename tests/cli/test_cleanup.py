"""`stella signals cleanup`: the real command, the real signer's process, with and without a running signer."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest
from chain_kit import Site, environment
from node_kit import eventually
from tests.signer.log_kit import logged

from stella_shared.bus import Bus

ARCHIVED = ["VALID_PENDING", "ARCHIVED", "ARCHIVED", "VALID_PENDING", "VALID_PENDING"]


def lines_here(site: Site) -> list[str]:
    return sorted(p.name for p in site.evidence.glob("*.ndjson.zst") if "open" not in p.name)


def test_cleanup_of_a_stopped_node(tmp_path: Path) -> None:
    """`--dry-run` changes nothing; then the lines go, the note is signed, and a second time there is nothing to do."""
    site = Site(tmp_path)
    before = {p: p.read_bytes() for p in site.evidence.rglob("*") if p.is_file()}
    said = site.good("cleanup", "--keep-chain-state", "--older-than", "7d", "--dry-run")
    assert "would remove the lines of chunks 2 to 3 (" in said
    assert before == {p: p.read_bytes() for p in site.evidence.rglob("*") if p.is_file()}
    said = site.good("cleanup", "--keep-chain-state", "--older-than", "7d")
    assert "removed the lines of chunks 2 to 3 (" in said
    assert ARCHIVED == site.statuses()
    assert ["000001.ndjson.zst", "000004.ndjson.zst", "000005.ndjson.zst"] == lines_here(site)
    assert [] == [p for p in (site.state / "run").iterdir() if p.name.startswith("errand")]
    assert "would remove the lines of chunk 4" in site.good(
        "cleanup", "--keep-chain-state", "--older-than", "4w", "--dry-run"
    )
    # Chunk 5 was closed just now; with 4 gone too there is nothing old left.
    site.good("cleanup", "--keep-chain-state", "--older-than", "1h")
    assert "nothing to remove" in site.good("cleanup", "--keep-chain-state", "--older-than", "1h")
    text = site.good("verify-chain", site.evidence)
    assert "Archived: 3 of these chunks" in text and "Note: chunk 5: cleanup of chunks 2 to 3" in text


@pytest.mark.parametrize(
    ("words", "damage", "code", "says"),
    [
        (["--older-than", "7d"], "", 2, "--keep-chain-state"),
        (["--keep-chain-state"], "", 2, "--older-than"),
        (["--keep-chain-state", "--older-than", "soon"], "", 2, "is no age"),
        (["--keep-chain-state", "--older-than", "7d"], "000002.ledger.json", 1, "does not verify"),
        (["--keep-chain-state", "--older-than", "7d"], "000003.ndjson.zst", 1, "000003.ndjson.zst is missing"),
    ],
)
def test_cleanup_refuses(tmp_path: Path, words: list[str], damage: str, code: int, says: str) -> None:
    """Wrong use and a chain that does not verify: nothing is removed."""
    site = Site(tmp_path)
    if damage:
        (site.evidence / damage).unlink()
    before = sorted(p.name for p in site.evidence.iterdir())
    done = site.stella("cleanup", *words)
    assert code == done.returncode, done.stderr
    assert says in done.stderr
    assert before == sorted(p.name for p in site.evidence.iterdir())


def test_unsigned_chunks_and_a_node_that_does_not_sign(tmp_path: Path) -> None:
    """What cannot be noted and signed is not removed."""
    site = Site(tmp_path, signing={"enabled": False})
    done = site.stella("cleanup", "--keep-chain-state", "--older-than", "7d")
    assert (2, True) == (done.returncode, "signing is switched off" in done.stderr)
    assert 4 == len(lines_here(site))


def test_chunks_wait_for_their_log(tmp_path: Path) -> None:
    """With submit_to_rekor, a chunk for which no log entry vouches stays and is named."""
    site = Site(tmp_path, signing={"submit_to_rekor": True})
    logged(tmp_path, site.node, keep=2)
    said = site.good("cleanup", "--keep-chain-state", "--older-than", "7d", "--dry-run")
    assert "kept until they are in the log: chunk 3" in said and "the lines of chunk 2 (" in said


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Site]:
    """A site whose signer runs, on a bus of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    beside = Path(sys.executable).with_name("nats-server")
    server = str(beside) if beside.exists() else shutil.which("nats-server")
    assert server
    site = Site(tmp_path, bus={"url": f"nats://127.0.0.1:{port}"})
    nats = subprocess.Popen(
        [server, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(tmp_path / "nats")], stderr=subprocess.DEVNULL
    )
    eventually(lambda: _answers(port))
    anyio.run(_make_streams, f"nats://127.0.0.1:{port}")
    log = (tmp_path / "signer.log").open("wb")
    signer = subprocess.Popen(
        [sys.executable, "-m", "stella_signer", "--config", str(site.config)],
        env=environment(), stderr=log,
    )  # fmt: skip
    try:
        eventually(lambda: (site.state / "signer.lock").exists() and "chain opened" in _log(tmp_path))
        yield site
    finally:
        signer.send_signal(signal.SIGKILL)
        signer.wait()
        nats.kill()
        nats.wait()
        log.close()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def _make_streams(url: str) -> None:
    async with Bus.connect(url, name="test") as bus:
        await bus.ensure_streams()


def _log(folder: Path) -> str:
    return (folder / "signer.log").read_text()


def test_cleanup_while_the_signer_runs_twice_at_once(running: Site) -> None:
    """The running signer records the notes; two commands at once do no harm, nor does verifying meanwhile."""
    words = ("cleanup", "--keep-chain-state", "--older-than", "7d")
    with ThreadPoolExecutor(3) as pool:
        first, second = pool.submit(running.stella, *words), pool.submit(running.stella, *words)
        time.sleep(0.5)
        checked = pool.submit(running.stella, "verify-chain", running.evidence)
        for done in (first.result(), second.result(), checked.result()):
            assert 0 == done.returncode, done.stdout + done.stderr
    report = running.report()
    assert report["valid"]
    assert 2 <= report["archived"]["chunks"] <= 3
    assert {"note"} == {c["close_reason"] for c in report["chunks"][4:]}
    assert {"cleanup"} == {told["note"]["kind"] for told in report["notes"]}
