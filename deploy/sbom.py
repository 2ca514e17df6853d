"""What each image's Python is made of: FOLDER/SERVICE.cdx.json (CycloneDX), of the packages that its Dockerfile names.

    python deploy/sbom.py FOLDER

Run by the Python of an environment that `make install` made: it has the same pins as the images, so each image's part
of it is what a document lists.  Nothing is downloaded.  tests/deploy compares the documents with the images.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
OURS = "stella-signals"
#: image: extras, as in deploy/compose/Dockerfile.  The bus's image holds one package, which is no Python.
IMAGES = {
    "collector": ("collector",),
    "enricher": ("enricher",),
    "signer": ("signer", "hsm"),
    "gateway": ("gateway",),
    "cli": ("cli", "signer", "hsm"),
}


def closure(name: str, extras: tuple[str, ...]) -> dict[str, Distribution]:
    """Return the distributions that `name` needs with these extras, itself among them, by normal name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found.setdefault(name, distribution(name))
        for text in found[name].requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, more) for more in ("", *needed.extras)]
    return found


def write(image: str, folder: Path) -> Path:
    """Write the document of one image."""
    out = folder / f"{image}.cdx.json"
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", scratch], check=True)
        (packages,) = Path(scratch).glob("lib/python*/site-packages")
        for found in closure(OURS, IMAGES[image]).values():
            info = Path(str(found.locate_file(""))) / str(getattr(found, "_path"))  # noqa: B009  # it has no public name
            copy = packages / info.name
            copy.mkdir()
            for file in info.iterdir():
                # Where an editable install has its source is of no interest.
                if file.is_file() and file.name != "direct_url.json":
                    (copy / file.name).symlink_to(file)
        # Its own validation takes some seconds for each; a test does it in a tenth of that.
        options = ("--no-validate", "--output-reproducible", "--pyproject", ROOT / "pyproject.toml", "-o", out)
        command = [sys.executable, "-m", "cyclonedx_py", "environment", *options, f"{scratch}/bin/python"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return out


def main() -> None:
    """Write all of them, and say where."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for out in pool.map(lambda image: write(image, folder), IMAGES):
            print(out)


if __name__ == "__main__":
    main()
