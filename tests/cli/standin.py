"""A stand-in for every service: beats on the real bus and passes one message from stage to stage.

Run as `python -m stella_<service>` out of a folder that `services_folder` makes.  It uses the real bus, the
real users and permissions and the real configuration; only the work is small.  Files in the folder
`$STANDIN` change its manners: `<service>.exit` holds an exit code to fail with at once, `<service>.deaf`
makes it ignore SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import anyio

from stella_shared import config, lifecycle, subjects
from stella_shared.bus import Bus, Message
from stella_shared.errors import TryAgain
from stella_shared.evidence import compressed
from stella_shared.wire import Beat

LINE = b'{"event":{"type":"file_open"},"n":%d}'


def services_folder(folder: Path) -> Path:
    """Make a folder whose packages stand in for the four services; return it for PYTHONPATH."""
    for service in ("collector", "enricher", "signer", "gateway"):
        package = folder / f"stella_{service}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(
            f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"from standin import main\nmain({service!r})\n"
        )
    return folder


def main(service: str) -> None:
    """Be `service` until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--instance", default="")
    parser.add_argument("--replay", default="")
    arguments = parser.parse_args()
    manners = Path(os.environ["STANDIN"])
    code = manners / f"{service}.exit"
    if code.exists():
        print("Error: the stand-in was told to fail", file=sys.stderr)
        sys.exit(int(code.read_text()))
    anyio.run(_serve, service, arguments.instance, Path(arguments.config), manners)
    if (manners / f"{service}.deaf").exists():
        time.sleep(600)


async def _serve(service: str, instance: str, config_file: Path, manners: Path) -> None:
    signals = config.load(config_file, {})
    account = config.bus_user(signals, service)
    with lifecycle.stop_event() as stop:
        async with Bus.connect(config.bus_url(signals), name=service, account=account) as bus:
            started = time.time()

            def beat() -> Beat:
                return Beat(
                    service=service,
                    instance=instance,
                    node=config.node_name(signals),
                    pid=os.getpid(),
                    version="0",
                    at=time.time(),
                    started_at=started,
                    state="ok",
                    detail={"probes": [{"name": "sys_enter_openat", "attached": True, "reason": ""}]},
                )

            async with anyio.create_task_group() as tasks:
                done = anyio.Event()
                tasks.start_soon(lifecycle.beating, bus, beat, done)
                if service == "collector":
                    tasks.start_soon(_collect, bus, signals, stop)
                if service in ("enricher", "signer"):
                    await _work(bus, signals, service, manners, stop)
                await stop.wait()
                if service == "collector":
                    await _publish(bus, subjects.raw(config.node_name(signals)), b"last", f"last-{os.getpid()}")
                tasks.cancel_scope.cancel()


async def _publish(bus: Bus, subject: str, data: bytes, msg_id: str) -> None:
    while True:
        try:
            return await bus.publish(subject, data, msg_id=msg_id)
        except TryAgain:
            await anyio.sleep(0.1)


async def _collect(bus: Bus, signals: config.Signals, stop: anyio.Event) -> None:
    number = 0
    while not stop.is_set():
        await _publish(bus, subjects.raw(config.node_name(signals)), b"%d" % number, f"{os.getpid()}-{number}")
        number += 1
        await anyio.sleep(0.05)


async def _work(bus: Bus, signals: config.Signals, service: str, manners: Path, stop: anyio.Event) -> None:
    enricher = service == "enricher"
    stream = subjects.RAW_STREAM if enricher else subjects.ENRICHED_STREAM
    durable = subjects.RAW_DURABLE if enricher else subjects.SIGNER_DURABLE
    filter_subject = subjects.RAW_SUBJECTS if enricher else subjects.ENRICHED_SUBJECTS
    async with bus.work(stream, durable, filter_subject=filter_subject, max_ack_pending=64) as work:
        while not stop.is_set() or await work.pending() != (0, 0):
            messages: list[Message] = []
            with anyio.move_on_after(0.1):
                messages = await work.get(16, 0.0)
            for message in messages:
                if enricher:
                    subject = subjects.enriched(config.node_name(signals), "file_open")
                    number = -1 if message.data == b"last" else int(message.data)
                    await _publish(bus, subject, compressed.pack(LINE % number + b"\n"), f"e-{message.msg_id}")
                else:
                    with (manners / "signed.ndjson").open("ab") as file:
                        file.write(compressed.unpack(message.data))
                await message.ack()
