"""The stand-in for a kernel: recorded batches of ring bytes, played again at the pace they had.

It needs no privilege, announces itself in the coverage (`stand_in`), the log and the heartbeat, and goes the
same way as real batches from the spool on.  A recording is one MessagePack `Recording`, made by
tests/system/record_demo.py.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Final

import anyio
import msgspec

from stella_collector import coverage
from stella_collector.probes import ProbeState, probes_of
from stella_collector.runs import Runs
from stella_collector.spool import Spool
from stella_shared import VERSION, clock, lifecycle, privileges, subjects
from stella_shared.bus import Bus
from stella_shared.config import Signals, bus_url, bus_user, digest, node_name
from stella_shared.errors import NotFound, UsageError
from stella_shared.raw_batches import EVENT, unpack_batch
from stella_shared.wire import RAW_VERSION, Beat, LaneRow, Ledger, Program, RawBatch, encode_raw

log = logging.getLogger(__name__)

SPOOL_BYTES: Final = 16 << 20
RECORDING_BYTES_MAX: Final = 64 << 20
#: Who started the demonstration wants to see its beginning.
CURTAIN_SECONDS: Final = 1.5


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One recorded batch: when, counted from the first, what was settled, the ring's bytes and names."""

    after_ns: int
    ledger: Ledger
    libraries: list[str]
    records: bytes
    cgroups: dict[int, str] = {}
    programs: dict[int, Program] = {}


class Recording(msgspec.Struct, frozen=True, array_like=True):
    """Recorded batches, and the boot they come from: cgroup ids and times mean nothing on another."""

    boot_id: str
    frames: list[Frame]


def load(path: Path) -> Recording:
    """Read a recording.  Raises `NotFound`, or `UsageError` when it is none."""
    try:
        if path.stat().st_size > RECORDING_BYTES_MAX:
            raise UsageError(f"{path} is larger than a recording may be ({RECORDING_BYTES_MAX} bytes)")
        return msgspec.msgpack.decode(path.read_bytes(), type=Recording)
    except OSError as e:
        raise NotFound(f"no recording at {path}: {e.strerror}") from None
    except msgspec.MsgspecError as e:
        raise UsageError(f"{path} is no recording: {e}") from None


def shifted(ledger: Ledger, taken: dict[int, int]) -> Ledger:
    """Return a frame's ledger with its numbers moved behind those that were played before."""
    rows = []
    for row in ledger.lanes:
        first = taken.get(row.lane, 0)
        width = row.next - row.first
        taken[row.lane] = first + width
        rows.append(LaneRow(row.lane, first, first + width, row.recorded, row.filtered, row.lost))
    now = clock.boottime_ns()
    return Ledger(now, now, rows, ledger.filtered, ledger.lost)


async def serve(signals: Signals, path: Path) -> None:
    """Play the recording once, then stay quiet until told to stop."""
    recording = load(path)
    node = node_name(signals)
    log.warning("this is a demonstration: events come from the recording %s, not from this kernel", path.name)
    account = bus_user(signals, "collector")
    runs = Runs(signals)
    why = "demonstration: played from a recording"
    states = [ProbeState(p.name, p.attach_point(), True, reason=why) for p, _ in probes_of(signals)]
    document = coverage.document(
        signals,
        states=states,
        targets=[],
        libraries=[],
        bpf_object_sha256="",
        btf_sha256="",
        config_sha256=digest(signals),
        libbpf="",
        reader="replay",
        version=VERSION,
        stand_in=f"recording {path.name}",
    )
    started = time.time()
    number = 0
    played = 0
    taken: dict[int, int] = {}
    with lifecycle.stop_event() as stop:
        async with Bus.connect(bus_url(signals), name="collector", account=account, tls=signals.bus.tls) as bus:
            spool = Spool(bus, subjects.raw(node), SPOOL_BYTES)

            def put(frame: Frame, *, final: bool = False) -> None:
                nonlocal number
                batch = RawBatch(
                    RAW_VERSION, node, recording.boot_id, runs.current, number, shifted(frame.ledger, taken),
                    document if number == 0 else b"", final, [], frame.libraries,
                    renumbered(frame.records, frame.ledger, taken), frame.cgroups, frame.programs,
                )  # fmt: skip
                spool.put(f"{runs.current}.{number}", encode_raw(batch))
                number += 1

            def beat() -> Beat:
                return Beat(
                    "collector", node, node, os.getpid(), VERSION, time.time(), started, "ok",
                    reason="demonstration: events come from a recording",
                    metrics={"stellaops_signals_batches_total": float(number)},
                    detail={
                        "privileges": privileges.left(),
                        "stand_in": path.name,
                        "records": played,
                        "probes": [msgspec.to_builtins(s) for s in states],
                    },
                )  # fmt: skip

            async with anyio.create_task_group() as tasks:
                done = anyio.Event()
                tasks.start_soon(spool.run)
                tasks.start_soon(lifecycle.beating, bus, beat, done)
                begin = anyio.current_time() + CURTAIN_SECONDS
                for frame in recording.frames:
                    with anyio.move_on_after(max(0.0, begin + frame.after_ns / 1e9 - anyio.current_time())):
                        await stop.wait()
                    if stop.is_set():
                        break
                    put(frame)
                    played += sum(row.recorded for row in frame.ledger.lanes)
                await stop.wait()
                put(Frame(0, Ledger(0, 0, [], {}, {}), [], b""), final=True)
                with anyio.move_on_after(10.0):
                    await spool.wait_empty()
                done.set()
                await anyio.sleep(0.05)
                tasks.cancel_scope.cancel()


def renumbered(records: bytes, ledger: Ledger, taken: dict[int, int]) -> bytes:
    """Return the batch with sequence numbers that follow on: `taken` already counts this frame."""
    offsets = {row.lane: taken[row.lane] - row.next for row in ledger.lanes}
    batch = unpack_batch(records)
    out = bytearray(records)
    at = len(out) - len(batch.events) * EVENT.size
    for ts, seq, who, what in batch.events:
        EVENT.pack_into(out, at, ts, seq + offsets.get(batch.whos[who][-1], 0), who, what)
        at += EVENT.size
    return bytes(out)
