"""What the images are made of, and whether anybody has been asked about it: deploy/sbom.py and deploy/audit.py."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.deploy.engine import Engine

ROOT = Path(__file__).parents[2]
IMAGES = ("collector", "enricher", "signer", "gateway", "cli")
AUDIT = [sys.executable, ROOT / "deploy" / "audit.py"]
#: Run in an image: what its Python could import.
LIST = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The CycloneDX document of each image, as `make sbom` writes them."""
    folder = tmp_path_factory.mktemp("sbom")
    command = [sys.executable, ROOT / "deploy" / "sbom.py", folder]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    written = {Path(row).name.removesuffix(".cdx.json"): Path(row) for row in said.splitlines()}
    assert set(IMAGES) == set(written)
    return {image: json.loads(path.read_bytes()) for image, path in written.items()}


def validator() -> Any:
    """Return a validator of CycloneDX 1.6 by its own schema, which comes with the library."""
    folder = files("cyclonedx.schema") / "_res"
    names = ("bom-1.6.SNAPSHOT.schema.json", "spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    schema, *others = (json.loads((folder / name).read_bytes()) for name in names)
    known = [(f"http://cyclonedx.org/schema/{name}", other) for name, other in zip(names[1:], others, strict=True)]
    return jsonschema_rs.validator_for(schema, registry=jsonschema_rs.Registry(known))


def test_each_document_is_valid_by_cyclonedx_own_schema(documents: dict[str, dict[str, Any]]) -> None:
    """All of them are, and one that is spoilt is not."""
    judge = validator()
    for image, document in documents.items():
        assert ("CycloneDX", "1.6") == (document["bomFormat"], document["specVersion"])
        assert [] == [f"{image}: {error.message}" for error in judge.iter_errors(document)]
        # Where this tree lies is nobody's business.
        assert str(ROOT) not in json.dumps(document)
    documents["cli"]["components"][0]["type"] = "libary"
    assert not judge.is_valid(documents["cli"])
    documents["cli"]["components"][0]["type"] = "library"


@pytest.mark.engine
@pytest.mark.slow
def test_each_document_lists_what_its_image_holds(engine: Engine, documents: dict[str, dict[str, Any]]) -> None:
    """Name by name and version by version, no more and no less."""
    with engine.running(bridges=False):
        for image in IMAGES:
            words = (
                "run",
                "--rm",
                "--network",
                "none",
                "--entrypoint",
                "python",
                f"stella-signals/{image}",
                "-c",
                LIST,
            )
            held = {(name, number) for name, number in json.loads(engine.docker(*words)) if name != "stella-signals"}
            listed = {(c["name"], c["version"]) for c in documents[image]["components"]}
            assert held == listed, image


@contextmanager
def osv(vulnerable: str) -> Iterator[str]:
    """Run a stand-in for OSV, which knows of one vulnerability in one package; give its URL."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
            known = {
                "id": "TEST-2026-1",
                "published": "2026-01-01T00:00:00Z",
                "affected": [
                    {
                        "package": {"name": asked["name"], "ecosystem": "PyPI"},
                        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
                    }
                ],
            }
            body = json.dumps({"vulns": [known]} if asked["name"] == vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def audited(service: str, lock: Path) -> subprocess.CompletedProcess[str]:
    """Run the audit."""
    command = [*AUDIT, "--service", service, "--lock", lock]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_an_audit_that_could_not_ask_says_so(tmp_path: Path) -> None:
    """Nothing listens, or what listens is no such service: exit code 10, and no word that could be taken for a pass."""
    lock = tmp_path / "lock"
    lock.write_text(f"click=={version('click')}\n")
    with osv("click") as service:
        answers = [audited("http://127.0.0.1:9/v1/query", lock), audited("https" + service.removeprefix("http"), lock)]
    for done in answers:
        assert (10, "") == (done.returncode, done.stdout), done.stderr
        assert done.stderr.startswith("NOT AUDITED: http")
        assert "is not known" in done.stderr


def test_an_audit_tells_what_is_known(tmp_path: Path) -> None:
    """A vulnerable package is named with its version and the fix, exit code 1; else it says how many were asked."""
    lock = tmp_path / "lock"
    lock.write_text(f"click=={version('click')}\nanyio=={version('anyio')}\n")
    with osv("click") as service:
        found = audited(service, lock)
    with osv("nothing") as service:
        clean = audited(service, lock)
    assert 1 == found.returncode, found.stderr
    assert f"click {version('click')}: TEST-2026-1, fixed in 99.0\n" in found.stdout
    assert (0, "2 packages asked about, 0 known vulnerabilities\n") == (clean.returncode, clean.stdout), clean.stderr


def test_every_pinned_package_is_one_that_an_audit_can_ask_about() -> None:
    """Name and version, nothing from elsewhere."""
    rows = (ROOT / "requirements.lock").read_text().splitlines()
    assert rows
    assert [] == [row for row in rows if len(row.split("==")) != 2 or "/" in row]
