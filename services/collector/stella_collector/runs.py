"""Runs: one life of the loaded BPF programs, which may outlive several collectors, and what is done with each.

    /sys/fs/bpf/stella/<node>/<run>/    map-* program-* link-* journal
    <state>/run/collector-<run>.json    what the kernel does not know of it (`Remembered`)
    <state>/run/collector.json          the run that is, or was, on record

A collector that dies leaves all of it.  The next one goes on with the run when it would have loaded the same.  When it
would not, it begins a run of its own, and reads the former one to its end.  What can be neither gone on with nor read
is closed from its counters: the signer is told how many numbers had been handed out (`wire.Closing`).  After a reboot
the counters are gone with the kernel: the closing then says so instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import struct
import threading
from pathlib import Path
from typing import Final

import anyio
import msgspec

from stella_collector.accounting import KERNEL_FILTERS, LANE_STRIDE, SEEN_BYTES, Accountant, decode_counters
from stella_collector.journal import Journal, size_of
from stella_collector.kernel import BPFFS, Kernel
from stella_collector.libbpf import Libbpf
from stella_collector.objects import LINK_PIN
from stella_collector.probes import ProbeState
from stella_shared import clock, kernel_records
from stella_shared.config import Signals, node_name, state_directory
from stella_shared.errors import StellaError, TryAgain
from stella_shared.subjects import node_token
from stella_shared.wire import RAW_VERSION, Closing

log = logging.getLogger(__name__)

JOURNAL_PIN: Final = "journal"
LANES_PIN: Final = "map-stella_lanes"
#: A former collector of this node that is being killed may take as long to let go.
_CLAIM_SECONDS: Final = 3.0
#: Collectors that began with a run and ended before they had stored a batch; then it is left.
TRIES_MAX: Final = 10


def pins_folder(signals: Signals) -> Path:
    """Return the folder of a node's pins."""
    # Two nodes may share a machine and a name (a test beside production): the state directory tells them apart.
    unique = hashlib.sha256(os.fsencode(state_directory(signals).absolute())).hexdigest()[:12]
    return BPFFS / "stella" / f"{node_token(node_name(signals))}-{unique}"


def layout() -> str:
    """Return what records and journals look like: a run of another layout cannot be read."""
    formats = sorted(
        (name, value.format) for name, value in vars(kernel_records).items() if isinstance(value, struct.Struct)
    )
    return hashlib.sha256(msgspec.json.encode((RAW_VERSION, 1, formats))).hexdigest()


class RunFile(msgspec.Struct):
    """`run/collector.json`: the run that is, or was, alive."""

    run: str
    boot_id: str


class Remembered(msgspec.Struct):
    """`run/collector-<run>.json`: what a run's next collector has to know.

    `attached` says that all was attached, `links` which pins that made.  `shape` is `kernel.shape_of`.
    """

    run: str
    boot_id: str
    shape: str
    layout: str
    lanes: int
    ring_bytes: int
    attached: bool = False
    tries: int = 0
    links: list[str] = []
    states: list[ProbeState] = []
    extras: tuple[str, ...] = ()
    counted: list[str] = []
    libraries: list[str] = []
    selected: dict[str, list[str]] = {}
    coverage: str = ""


class Left(msgspec.Struct):
    """What former collectors left: a run to go on with, runs to be read to their end, and the ends of the others."""

    go_on: Remembered | None
    finish: list[Remembered]
    closings: list[Closing]


class Runs:
    """This node's runs.  `current` is the one that is recorded now."""

    def __init__(self, signals: Signals) -> None:
        self._state = state_directory(signals) / "run"
        self._file = self._state / "collector.json"
        self._pins = pins_folder(signals)
        self._lock = threading.Lock()
        #: Descriptors whose locks are held as long as this process lives.
        self._claims: list[int] = []
        self.current = secrets.token_hex(8)
        self.pinned = False
        self.pin_reason = ""

    async def claim(self) -> None:
        """Be the only collector of this node until the process ends.  Raises `TryAgain` while there is another."""
        self._state.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._state / "collector.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._claims.append(lock)
        with anyio.move_on_after(_CLAIM_SECONDS):
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._warn_of_strangers()
                    return
                await anyio.sleep(0.05)
        raise TryAgain(
            f"another collector works on {self._state.parent}", hint="a node has one: `stella signals stop` ends it"
        )

    def _hold_pins(self) -> None:
        """Show other nodes' collectors that these pins are read, by a lock on their folder."""
        held = _lock(self._pins)
        if held is not None:
            self._claims.append(held)

    def _warn_of_strangers(self) -> None:
        """Say which runs of other nodes are attached though no collector reads them."""
        with contextlib.suppress(OSError):
            for folder in sorted(self._pins.parent.iterdir()):
                if folder == self._pins or not any(folder.glob(f"*/{LINK_PIN}*")):
                    continue
                held = _lock(folder)
                if held is not None:
                    os.close(held)
                    log.warning(
                        "the probes of another node are attached, and nobody reads them: %s. If it never comes back: "
                        "stella signals detach --all",
                        folder,
                    )

    # ---- what is there

    def look(self, lib: Libbpf, lanes: int, shape: str, *, keeps: bool) -> Left:
        """Return what former collectors left.  `keeps`: whether our reader can go on in another one's ring."""
        left = Left(None, [], [])
        boot = clock.boot_id()  # the file system does not outlive the kernel
        for memory in self._state.glob("collector-*.json"):
            if not self.folder(memory.stem.removeprefix("collector-")).exists():
                memory.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for pins in sorted(self._pins.iterdir()):
                known = self._recall(pins.name) if pins.is_dir() else None
                if known is not None and keeps and _can_be_read(known, pins, boot, lanes):
                    whole = known.shape == shape and all((pins / link).exists() for link in known.links)
                    if whole and left.go_on is None:
                        left.go_on = known
                    else:
                        left.finish.append(known)
                    continue
                for link in pins.glob(f"{LINK_PIN}*") if pins.is_dir() else ():
                    link.unlink()  # first it is detached: then its counters are final
                try:
                    closing = _read(lib, pins, boot, lanes)
                except StellaError as e:
                    closing = Closing(pins.name, boot, {}, {}, f"its counters cannot be read: {e}")
                if pins.is_dir() and not closing.taken and not (known and known.attached):
                    self.forget(pins.name)  # its collector ended before anything was attached
                else:
                    left.closings.append(closing)
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            last = msgspec.json.decode(self._file.read_bytes(), type=RunFile)
            known_runs = {c.run for c in left.closings} | {r.run for r in left.finish}
            if last.run not in known_runs | ({left.go_on.run} if left.go_on else set()):
                why = (
                    "its counters were not pinned"
                    if last.boot_id == boot
                    else "the machine was restarted, and the counters ended with that kernel"
                )
                left.closings.append(Closing(last.run, last.boot_id, {}, {}, why))
        return left

    def take(self, run: str) -> None:
        """Go on with `run`."""
        self.current, self.pinned = run, True
        self._hold_pins()

    def folder(self, run: str) -> Path:
        """Return the folder of a run's pins."""
        return self._pins / run

    def journal(self, lib: Libbpf, run: str, lanes: int) -> Journal:
        """Return the journal that a run has left."""
        return _journal(lib.open_pinned(self.folder(run) / JOURNAL_PIN), lanes)

    # ---- the life of a run

    def open(self, kernel: Kernel, lib: Libbpf, remembered: Remembered) -> Journal | None:
        """Pin the new run and make its journal.  Where that is not possible, `pin_reason` says why."""
        folder = self.folder(self.current)
        try:
            folder.mkdir(parents=True, mode=0o700)
            self._hold_pins()
            if not kernel.ring.can_keep:
                kernel.pin_counters(folder / LANES_PIN)
                self.pinned = True
                return None
            self.remember(remembered)
            journal = self._new_journal(lib, folder, kernel.lanes)
            kernel.pin(folder)
        except (StellaError, OSError) as e:
            self.pin_reason = str(e)
            self.forget(self.current)
            return None
        self.pinned = True
        return journal

    def _new_journal(self, lib: Libbpf, folder: Path, lanes: int) -> Journal:
        fd = lib.create_memory("stella_journal", size_of(_books_bytes(lanes)))
        try:
            lib.pin(fd, folder / JOURNAL_PIN)
        except StellaError:
            os.close(fd)
            raise
        return _journal(fd, lanes)

    def remember(self, remembered: Remembered) -> None:
        """Write down what the run's next collector has to know.  Any thread may."""
        with self._lock:
            _replace(self._memory(remembered.run), msgspec.json.encode(remembered))

    def started(self, closed: list[Closing]) -> None:
        """The first batch is stored on the bus: the predecessors' books are closed, and this run is on record."""
        for closing in closed:
            self.forget(closing.run)
        _replace(self._file, msgspec.json.encode(RunFile(self.current, clock.boot_id())))

    def ended(self) -> None:
        """The final batch is stored on the bus: nothing of this run is left to close."""
        self.forget(self.current)
        with contextlib.suppress(OSError):
            self._pins.rmdir()
        self._file.unlink(missing_ok=True)

    def forget(self, run: str) -> None:
        """Remove all that is pinned and remembered of a run."""
        unpin(self.folder(run))
        self._memory(run).unlink(missing_ok=True)

    def _memory(self, run: str) -> Path:
        return self._state / f"collector-{run}.json"

    def _recall(self, run: str) -> Remembered | None:
        try:
            return msgspec.json.decode(self._memory(run).read_bytes(), type=Remembered)
        except (OSError, msgspec.MsgspecError):
            return None


def unpin(pins: Path) -> None:
    """Remove a run's pins, links first: entry sides go before exit sides.  What is not there is fine."""
    with contextlib.suppress(OSError):
        if not pins.is_dir():
            pins.unlink()
            return
        for pin in sorted(pins.iterdir(), key=lambda pin: (pin.name.startswith(LINK_PIN), pin.name), reverse=True):
            pin.unlink()
        pins.rmdir()


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock of a folder, None when somebody else has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _can_be_read(known: Remembered, pins: Path, boot: str, lanes: int) -> bool:
    return (
        known.attached
        and known.tries < TRIES_MAX
        and (known.boot_id, known.lanes, known.layout) == (boot, lanes, layout())
        and (pins / JOURNAL_PIN).exists()
    )


def _books_bytes(lanes: int) -> int:
    return len(Accountant(lanes).state()) + lanes * SEEN_BYTES


def _journal(fd: int, lanes: int) -> Journal:
    """Return the journal in the map behind `fd`, which is closed."""
    books = _books_bytes(lanes)
    try:
        memory = mmap.mmap(fd, size_of(books), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as e:
        raise StellaError(f"the journal of a run cannot be mapped: {e}") from None
    finally:
        os.close(fd)
    return Journal(memory, books)


def _replace(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_bytes(data)
    new.replace(file)


def _read(lib: Libbpf, pins: Path, boot_id: str, lanes: int) -> Closing:
    # Before there were journals the counters alone were pinned, under the name of the run.
    fd = lib.open_pinned(pins / LANES_PIN if pins.is_dir() else pins)
    try:
        span = -(-lanes * LANE_STRIDE // mmap.PAGESIZE) * mmap.PAGESIZE
        with mmap.mmap(fd, span, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            counters = decode_counters(memory[: lanes * LANE_STRIDE])
    except (OSError, ValueError) as e:
        raise StellaError(f"pinned counters {pins.name}: {e}") from None
    finally:
        os.close(fd)
    return Closing(
        run=pins.name,
        boot_id=boot_id,
        taken={index: c.taken for index, c in enumerate(counters) if c.taken},
        filtered={name: sum(c.filtered[i] for c in counters) for i, name in enumerate(KERNEL_FILTERS)},
    )
