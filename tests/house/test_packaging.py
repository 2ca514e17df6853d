"""The house as it is delivered: what a wheel and an sdist hold, and that the import rules hold."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "stella_shared",
    "stella_collector",
    "stella_enricher",
    "stella_signer",
    "stella_gateway",
    "stella_cli",
}


def build(kind: str, out: Path) -> Path:
    """Build the wheel or the sdist with the project's own backend."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out], cwd=ROOT, check=True, capture_output=True
    )
    return next(out.iterdir())


def test_a_wheel_puts_exactly_six_names_into_site_packages(tmp_path: Path) -> None:
    """Six packages and the metadata, nothing else; the native parts are among them."""
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = wheel.namelist()
    top = {name.split("/")[0] for name in names}
    assert PACKAGES == {name for name in top if not name.endswith(".dist-info")}
    for native in (
        "stella_collector/native/stella.bpf.o",
        "stella_collector/native/ring.so",
        "stella_collector/native/libbpf.so.1",
        "stella_enricher/native/lines.so",
        "stella_shared/evidence/native/merkle.so",
        "stella_shared/evidence/native/lines.so",
        "stella_shared/native/confine.so",
    ):
        assert native in names
    assert "stella_collector/demo.ring" in names


def test_an_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    """Sources of every part, and nothing that was built."""
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    for needed in ("bpf/stella.bpf.c", "bpf/Makefile", "services/collector/stella_collector/ring.c", "pyproject.toml"):
        assert needed in names
    assert not [name for name in names if "/native/" in name or name.startswith("bpf/build/")]


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("services/signer/stella_signer/steps.py", "import stella_gateway", "Services never import each other"),
        ("shared/stella_shared/clock.py", "import stella_cli", "The shared contracts import none of ours"),
        ("cli/stella_cli/console.py", "import stella_collector", "The command meets the services on the bus only"),
        ("services/signer/stella_signer/steps.py", "import nats", "NATS is spoken in one module"),
        ("services/signer/stella_signer/steps.py", "import fastapi", "The web framework stays in the gateway"),
        ("services/collector/stella_collector/spool.py", "import ctypes", "libbpf is spoken in one module"),
        ("services/signer/stella_signer/steps.py", "import stella_cli", "Services do not import the command"),
        (
            "services/enricher/stella_enricher/symbols/store.py",
            "import elftools",
            "ELF, DWARF and mangled names are read in the child process",
        ),
        (
            "services/collector/stella_collector/kernel.py",
            "from stella_collector.binaries import elf",
            "Nothing but the child process loads the readers of files",
        ),
        (
            "services/enricher/stella_enricher/frames.py",
            "from stella_enricher.symbols import names",
            "Nothing but the child process loads the readers of files",
        ),
    ],
)
def test_each_import_rule_fails_when_it_is_broken(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """A copy of the tree with one forbidden import in it is refused, by the rule that forbids it."""
    copy = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "pyproject.toml"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    for name in listed:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    broken = copy / module
    broken.write_text(broken.read_text() + f"\n{line}\n")
    path = ":".join(
        str(copy / room)
        for room in ("shared", "services/collector", "services/enricher", "services/signer", "services/gateway", "cli")
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=copy, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 0 != done.returncode, done.stdout
    assert f"{contract} BROKEN" in " ".join(done.stdout.split()), done.stdout + done.stderr
