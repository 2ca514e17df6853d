"""One engine for the whole folder, with everything built that its tests run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import engine as kit
from tests.deploy.engine import Engine

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
TARGETS = ("nats", "collector", "enricher", "gateway", "signer", "cli")
#: A machine on which everything is installed as docs/deployment.md says, out of the other images, and systemd runs.
MACHINE = """
FROM runtime AS machine
RUN apt-get update && apt-get install -y --no-install-recommends systemd systemd-sysv libelf1
COPY --from=collector-packages /opt/stella /opt/stella
COPY --from=enricher-packages /opt/stella /opt/stella
COPY --from=signer-packages /opt/stella /opt/stella
COPY --from=gateway-packages /opt/stella /opt/stella
COPY --from=cli-packages /opt/stella /opt/stella
COPY --from=nats-packages /usr/local/bin/nats-server /opt/stella/bin/nats-server
HEALTHCHECK NONE
CMD ["/lib/systemd/systemd"]
"""


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine, not running, whose data root holds our images.  What the machine lacks is told and skips the test."""
    if reason := kit.lacking():
        pytest.skip(f"no container engine of our own: {reason}")
    kit.fetch()
    # Not /tmp, which may be a file system that overlayfs cannot stand on.
    with tempfile.TemporaryDirectory(prefix="stella-engine-", dir="/var/tmp") as folder:
        engine = Engine(Path(folder))
        with engine.running(bridges=False):
            engine.import_base()
            build_all(engine)
        yield engine


def build_all(engine: Engine) -> None:
    """Build every image from the shipped Dockerfile, side by side: compose would build them one after the other."""
    dockerfile = engine.folder / "Dockerfile"
    dockerfile.write_text((COMPOSE / "Dockerfile").read_text() + MACHINE)
    shutil.copy(COMPOSE / "Dockerfile.dockerignore", engine.folder)
    words = ("build", "--quiet", "--network", "host", "--file", dockerfile)
    builds = [
        engine.start_docker(*words, "--target", target, "--tag", f"stella-signals/{target}", COMPOSE.parents[1])
        for target in (*TARGETS, "machine")
    ]
    try:
        for build in builds:
            _, said = build.communicate(timeout=300)
            assert 0 == build.returncode, said[-4000:]
    finally:
        for build in builds:
            if build.poll() is None:
                build.terminate()
                build.communicate()
