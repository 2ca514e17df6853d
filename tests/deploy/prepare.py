"""`python -m tests.deploy.prepare FOLDER`: builds on an engine of its own, in FOLDER, everything that this room runs.

In a process of its own, so that it goes on while other rooms' tests run, which wait most of the time.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from tests.deploy import engine as kit
from tests.deploy.engine import Engine

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
TARGETS = ("nats", "collector", "enricher", "gateway", "signer", "cli")
BUILD_SECONDS = 600
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
            _, said = build.communicate(timeout=BUILD_SECONDS)
            assert 0 == build.returncode, said[-4000:]
    finally:
        for build in builds:
            if build.poll() is None:
                build.terminate()
                build.communicate()


def main() -> None:
    """Do it.  Told to stop, it ends the engine first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    kit.fetch()
    engine = Engine(Path(sys.argv[1]))
    with engine.running(bridges=False):
        engine.import_base()
        build_all(engine)


if __name__ == "__main__":
    main()
