"""Makes the recording that `make demo` plays: `python -m tests.system.record_demo OUT`.

Runs a node on this kernel over a short, harmless scene in a cgroup of its own, and keeps the raw batches as
they pass on the bus.  Look at what is in it before you commit one: file names and arguments are recorded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import msgspec

from stella_collector.replay import Frame, Recording
from stella_shared import clock, kernel_records, raw_batches, subjects
from stella_shared.bus import Bus
from stella_shared.wire import RawBatch, decode_raw
from tests.system.node import HERE, Node, free_port, running
from tests.system.test_known_count import certificate

#: Where PROCESS_EXEC_BODY has the number of ancestors.
COUNT = 10
SCENE = """
cat /etc/hostname /etc/os-release >/dev/null
cat /etc/shadow >/dev/null
cat /root/.ssh/id_ed25519 2>/dev/null
ls /var/lib >/dev/null
cp /etc/services "$1/copied"
tail -n 1 "$1/copied" >/dev/null
"""


async def keep(url: str, stop: anyio.Event, batches: list[RawBatch]) -> None:
    """Collect the node's raw batches until `stop`."""
    async with Bus.connect(url, name="recorder") as bus:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def end() -> None:
                    await stop.wait()
                    scope.cancel()

                tasks.start_soon(end)
                async for message in bus.tail(subjects.raw("demo")):
                    batches.append(decode_raw(message.data))


async def record(node: Node, url: str, folder: Path) -> list[RawBatch]:
    """Play the scene and return its batches."""
    batches: list[RawBatch] = []
    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, url, stop, batches)
        await anyio.sleep(1.0)
        await anyio.to_thread.run_sync(scene, node, folder)
        await anyio.sleep(1.5)
        stop.set()
    return batches


def scene(node: Node, folder: Path) -> None:
    """A few files, a script, connections, TLS."""
    script = folder / "scene.sh"
    script.write_text("#!/bin/sh\n" + SCENE)
    script.chmod(0o755)
    # The system's own Python and a bare environment: no path of whoever records this.
    program = folder / "program.py"
    program.write_text((HERE / "known_count.py").read_text())
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    node.cgroup.run(script, folder, env=env, cwd="/").wait()
    command = ["/usr/bin/python3", "-I", "-S", program, folder, "3", certificate(folder)]
    with node.cgroup.run(*command, env=env, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        time.sleep(2.0)
        process.communicate(b"go\nend\n", timeout=20)


def without_strangers(records: bytes, since_ns: int) -> bytes:
    """Return the batch without the ancestors that are older than the scene: they are the recorder's business."""
    out = bytearray(records)
    at = raw_batches.BATCH_COUNTS.size + raw_batches.BATCH_COUNTS.unpack_from(records)[0] * raw_batches.WHO.size
    for what in raw_batches.unpack_batch(records).whats:
        if raw_batches.WHAT.unpack_from(what)[0] == kernel_records.PROCESS_EXEC:
            body = at + raw_batches.WHAT.size
            fields = list(kernel_records.PROCESS_EXEC_BODY.unpack_from(out, body))
            rows = body + kernel_records.PROCESS_EXEC_BODY.size
            old = [
                i
                for i in range(fields[COUNT])
                if kernel_records.ANCESTOR.unpack_from(out, rows + i * kernel_records.ANCESTOR.size)[0] < since_ns
            ]
            for i in old:
                kernel_records.ANCESTOR.pack_into(out, rows + i * kernel_records.ANCESTOR.size, 0, 0, 0, b"")
            fields[COUNT] -= len(old)
            kernel_records.PROCESS_EXEC_BODY.pack_into(out, body, *fields)
        at += len(what)
    return bytes(out)


def main() -> None:
    """Write the recording."""
    since_ns = clock.boottime_ns()
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name) / "scene"
        folder.mkdir()
        # A server of our own without accounts: the node's own lets nobody listen to raw batches.
        port = free_port()
        url = f"nats://127.0.0.1:{port}"
        server = [Path(sys.executable).with_name("nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", name]
        with subprocess.Popen(server, stderr=subprocess.DEVNULL) as nats:
            try:
                with running(Path(name) / "node", "demo", bus={"url": url}) as node:
                    batches = anyio.run(record, node, url, folder)
            finally:
                nats.terminate()
    batches = [b for b in batches if b.records]
    first = batches[0].ledger.end_ns
    frames = [
        Frame(
            b.ledger.end_ns - first,
            b.ledger,
            b.libraries,
            without_strangers(b.records, since_ns),
            b.cgroups,
            b.programs,
        )
        for b in batches
    ]
    out = Path(sys.argv[1])
    out.write_bytes(msgspec.msgpack.encode(Recording(batches[0].boot_id, frames)))
    print(f"{out}: {len(frames)} batches, {sum(sum(r.recorded for r in f.ledger.lanes) for f in frames)} events")


if __name__ == "__main__":
    main()
