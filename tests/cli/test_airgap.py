"""The air gap with the real command: export, manifest, import, verification on a machine that knows only the key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chain_kit import Site, environment, months


class Verifier:
    """The machine on the other side: an empty folder and no node."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.imported = folder / "imported" / "evidence"
        self.config = folder / "stellaops.yaml"
        self.config.write_text(f"signals:\n  output_directory: {folder}/nothing/evidence\n")

    def stella(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stella_cli", "signals", *map(str, words)]
        env = environment() | {"STELLA_CONFIG": str(self.config)}
        return subprocess.run(
            command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )

    def take(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return self.stella("import", *words, "--to", self.imported)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path / "node", chain=False)
    made.node = months(tmp_path / "node")
    return made


@pytest.fixture
def verifier(tmp_path: Path) -> Verifier:
    return Verifier(tmp_path / "verifier")


def test_the_procedure_of_the_runbook(site: Site, verifier: Verifier, tmp_path: Path) -> None:
    """Export January with proofs, make the manifest, carry both over, import, verify: as it is written there."""
    done = site.stella(
        "export", "--from", "2026-01-01", "--to", "2026-01-31", "--include-proofs",
        "--output", "january-evidence.tar.gz", cwd=tmp_path,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    assert "chunks 3 to 5 of chain" in done.stdout
    said = site.good("manifest", "january-evidence.tar.gz", cwd=tmp_path)
    (tmp_path / "manifest.json").write_text(said)
    told = json.loads(said)
    assert ("january-evidence.tar.gz", 3, 5, 14) == (
        told["archive"], told["manifest"]["first"], told["manifest"]["last"], len(told["files"])
    )  # fmt: skip
    for name in ("january-evidence.tar.gz", "manifest.json"):
        shutil.move(tmp_path / name, verifier.folder)
    # Without a key nobody vouches for it, and nothing is written.
    done = verifier.take("january-evidence.tar.gz")
    assert (2, False) == (done.returncode, verifier.imported.parent.exists())
    assert "--key sha256:" in done.stderr
    key = f"sha256:{site.node.made.key_id}"
    done = verifier.take("january-evidence.tar.gz", "--manifest", "manifest.json", "--key", key)
    assert 0 == done.returncode, done.stderr
    assert f"imported to {verifier.imported}" in done.stdout and ": range" in done.stdout
    done = verifier.stella("verify-chain", "--offline", f"{verifier.imported}/")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "State: range, chunks 3 to 5" in done.stdout
    assert "/imported/evidence" in verifier.stella("import", "--help").stdout
    # The key is remembered beside the evidence, for its owner alone; February joins by it.
    assert 0o700 == (verifier.imported.parent / "state").stat().st_mode & 0o777
    site.good("export", "--from", "2026-02-01", "--to", "2026-02-28", "--output", verifier.folder / "february.tar.gz")
    done = verifier.take("february.tar.gz")
    assert 0 == done.returncode, done.stderr
    assert "joined to" in done.stdout and "chunks 3 to 7" in done.stdout
    done = verifier.stella("verify-chain", verifier.imported, "--head", "manifest.json", "--format", "json")
    assert (True, "range") == (json.loads(done.stdout)["valid"], json.loads(done.stdout)["state"])


def test_two_exports_are_byte_for_byte_the_same(site: Site, tmp_path: Path) -> None:
    """Made by two processes, each with its own signature."""
    for name in ("a.tar.gz", "b.tar.gz"):
        site.good("export", "--from", "2026-01-01", "--to", "2026-01-31", "--output", tmp_path / name)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def test_an_archive_is_verified_by_its_manifest(site: Site, verifier: Verifier) -> None:
    """A cut at the end of what was pinned shows; an import of the wrong archive is refused."""
    key = f"sha256:{site.node.made.key_id}"
    for name, until in (("long", "2026-01-31"), ("short", "2026-01-20")):
        path = verifier.folder / f"{name}.tar.gz"
        site.good("export", "--from", "2026-01-01", "--to", until, "--output", path)
        (verifier.folder / f"{name}.json").write_text(site.good("manifest", path))
    done = verifier.stella("verify-chain", "long.tar.gz", "--key", key, "--head", "long.json")
    assert 0 == done.returncode, done.stdout
    done = verifier.stella("verify-chain", "short.tar.gz", "--key", key, "--head", "long.json")
    assert (1, True) == (done.returncode, "(truncated)" in done.stdout)
    assert "State: truncated" in done.stdout
    done = verifier.take("short.tar.gz", "--key", key, "--manifest", "long.json")
    assert (1, False) == (done.returncode, verifier.imported.exists())
    assert 4 == verifier.take("nowhere.tar.gz", "--key", key).returncode
    assert 4 == verifier.take("long.tar.gz", "--key", key, "--manifest", "nowhere.json").returncode
    assert 1 == verifier.take("long.tar.gz", "--key", key, "--manifest", "stellaops.yaml").returncode


def test_export_refuses(site: Site, tmp_path: Path) -> None:
    """No chunk in that time: 4.  A file that is there: 2, and it stays.  A bad chain: 1.  Nothing is left over."""
    out = tmp_path / "out.tar.gz"
    assert 4 == site.stella("export", "--from", "2030-01-01", "--output", out).returncode
    assert 2 == site.stella("export", "--from", "soon", "--output", out).returncode
    assert 2 == site.stella("export", "--output", tmp_path / "out.zip").returncode
    assert 2 == site.stella("export", "--output", tmp_path / "none" / "out.tar.gz").returncode
    out.write_bytes(b"mine")
    done = site.stella("export", "--output", out)
    assert (2, b"mine") == (done.returncode, out.read_bytes())
    assert "--force" in done.stderr
    site.good("export", "--output", out, "--force")
    assert b"mine" != out.read_bytes()
    site.node.file(4, "ndjson.zst").unlink()
    done = site.stella("export", "--output", out, "--force")
    assert (1, True) == (done.returncode, "does not verify" in done.stderr)
    assert {"node", "out.tar.gz"} == {p.name for p in tmp_path.iterdir()}


def test_the_signers_process_signs_nothing_but_what_it_made_itself(site: Site) -> None:
    """It takes a span of time and reads the evidence: no text of the caller reaches the key."""
    command = [sys.executable, "-m", "stella_signer", "--config", str(site.config), "--manifest", "--since", "x\n{}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert (2, "") == (done.returncode, done.stdout)


def test_a_nodes_own_evidence_takes_no_import(site: Site, tmp_path: Path) -> None:
    """It would put things into a chain, or beside its key, that the signer did not write."""
    site.good("export", "--output", tmp_path / "a.tar.gz")
    done = site.stella("import", tmp_path / "a.tar.gz", "--to", site.evidence)
    assert (2, True) == (done.returncode, "a node's own evidence" in done.stderr)
    done = site.stella("import", tmp_path / "a.tar.gz", "--to", site.evidence.parent / "other")
    assert (2, True) == (done.returncode, "lies beside a node's own state" in done.stderr)
    assert not (site.evidence.parent / "other").exists()
    assert site.report()["valid"]
