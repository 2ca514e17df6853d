"""Runs: one life of the loaded programs, and the closing of those that ended badly.

A run's lane counters are pinned in the bpf file system while it lives, and `run/collector.json` in the state
directory names it.  A collector that dies leaves both.  The next one reads the counters, tells the signer
how many numbers had been handed out (`wire.Closing`), and removes the pin once that is stored on the bus.
After a reboot the counters are gone with the kernel: the closing then says so instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
from pathlib import Path

import msgspec

from stella_collector.accounting import KERNEL_FILTERS, LANE_STRIDE, decode_counters
from stella_collector.kernel import BPFFS, Kernel
from stella_collector.libbpf import Libbpf
from stella_shared import clock
from stella_shared.config import Signals, node_name, state_directory
from stella_shared.errors import StellaError
from stella_shared.subjects import node_token
from stella_shared.wire import Closing


def pins_folder(signals: Signals) -> Path:
    """Return the folder of a node's pins."""
    # Two nodes may share a machine and a name (a test beside production): the state directory tells them apart.
    unique = hashlib.sha256(os.fsencode(state_directory(signals).absolute())).hexdigest()[:12]
    return BPFFS / "stella" / f"{node_token(node_name(signals))}-{unique}"


class RunFile(msgspec.Struct):
    """`run/collector.json`: the run that is, or was, alive."""

    run: str
    boot_id: str


class Runs:
    """This node's runs.  `current` is the new run's name."""

    def __init__(self, signals: Signals) -> None:
        self._file = state_directory(signals) / "run" / "collector.json"
        self._pins = pins_folder(signals)
        self.current = secrets.token_hex(8)
        self.pinned = False
        self.pin_reason = ""

    def closings(self, lib: Libbpf, lanes: int) -> list[Closing]:
        """Return the end of every run that has none yet, as far as it can be known."""
        found: list[Closing] = []
        with contextlib.suppress(OSError):
            for pin in sorted(self._pins.iterdir()):
                boot = clock.boot_id()  # the file system does not outlive the kernel
                try:
                    found.append(_read(lib, pin, boot, lanes))
                except StellaError as e:
                    found.append(Closing(pin.name, boot, {}, {}, f"its counters cannot be read: {e}"))
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            last = msgspec.json.decode(self._file.read_bytes(), type=RunFile)
            if last.run not in {c.run for c in found}:
                why = (
                    "its counters were not pinned"
                    if last.boot_id == clock.boot_id()
                    else "the machine was restarted, and the counters ended with that kernel"
                )
                found.append(Closing(last.run, last.boot_id, {}, {}, why))
        return found

    def open(self, kernel: Kernel) -> None:
        """Pin the counters of the new run.  Where that is not possible, `pin_reason` says why."""
        try:
            self._pins.mkdir(parents=True, exist_ok=True, mode=0o700)
            kernel.pin_counters(self._pins / self.current)
            self.pinned = True
        except (StellaError, OSError) as e:
            self.pin_reason = str(e)

    def started(self, closed: list[Closing]) -> None:
        """The first batch is stored on the bus: the predecessors' books are closed, and this run is on record."""
        for closing in closed:
            with contextlib.suppress(OSError):
                (self._pins / closing.run).unlink()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(RunFile(self.current, clock.boot_id())))
        new.replace(self._file)

    def ended(self) -> None:
        """The final batch is stored on the bus: nothing of this run is left to close."""
        with contextlib.suppress(OSError):
            (self._pins / self.current).unlink()
        with contextlib.suppress(OSError):
            self._pins.rmdir()
        self._file.unlink(missing_ok=True)


def _read(lib: Libbpf, pin: Path, boot_id: str, lanes: int) -> Closing:
    fd = lib.open_pinned(pin)
    try:
        span = -(-lanes * LANE_STRIDE // mmap.PAGESIZE) * mmap.PAGESIZE
        with mmap.mmap(fd, span, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            counters = decode_counters(memory[: lanes * LANE_STRIDE])
    except (OSError, ValueError) as e:
        raise StellaError(f"pinned counters {pin.name}: {e}") from None
    finally:
        os.close(fd)
    return Closing(
        run=pin.name,
        boot_id=boot_id,
        taken={index: c.taken for index, c in enumerate(counters) if c.taken},
        filtered={name: sum(c.filtered[i] for c in counters) for i, name in enumerate(KERNEL_FILTERS)},
    )
