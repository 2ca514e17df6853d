"""What is read of loaded programs, whoever loaded them: the ring, the lanes' counters, the names of numbers."""

from __future__ import annotations

import mmap
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

from stella_collector.accounting import LANE_STRIDE
from stella_collector.libbpf import Libbpf
from stella_collector.naming import KernelProgram
from stella_collector.objects import Maps, Pinned
from stella_collector.ring import open_ring
from stella_shared.kernel_records import text

#: struct stella_program and struct stella_cgroup, without their paths, which end at WALK_MAX of WALK_ROOM bytes.
PROGRAM_HEAD: Final = struct.Struct("<QIHBB")
CGROUP_HEAD: Final = struct.Struct("<HBBI")
WALK_MAX, WALK_ROOM = 512, 768
_FLUSH: Final = "stella_fn_flush"


class Reading(ABC):
    """The reading side of a loaded object."""

    def __init__(self, lib: Libbpf, obj: Maps, lanes: int, ring_bytes: int) -> None:
        self._object = obj
        self.lanes = lanes
        self.ring = open_ring(lib, obj.map_fd("stella_ring"), ring_bytes, lanes)
        span = -(-lanes * LANE_STRIDE // mmap.PAGESIZE) * mmap.PAGESIZE
        self._lanes_map = mmap.mmap(obj.map_fd("stella_lanes"), span, mmap.MAP_SHARED, mmap.PROT_READ)

    @property
    @abstractmethod
    def libraries(self) -> list[str]:
        """Names of files that records refer to by index."""

    def counters(self) -> bytes:
        """Return the lanes' counters as they stand, one row of 128 bytes a lane."""
        return self._lanes_map[: self.lanes * LANE_STRIDE]

    def missed(self) -> int:
        """Return how many program runs the kernel skipped because the program was already running there."""
        return sum(self._object.programs[name].recursion_misses() for name in self.counted())

    @abstractmethod
    def counted(self) -> Iterable[str]:
        """Return the programs whose skipped runs count."""

    @abstractmethod
    def flush(self) -> int:
        """Turn counters of watched functions into records; return how many found no room in the ring and wait."""

    @abstractmethod
    def detach(self) -> None:
        """Detach everything; what was recorded stays in the ring."""

    def close_reading(self) -> None:
        """Let go of the ring's and the counters' memory."""
        self.ring.close()
        self._lanes_map.close()

    def cgroup(self, cgroup: int) -> str | None:
        """Return the path of a cgroup in which something was recorded, None when it was forgotten."""
        found = self._object.lookup("stella_cgroups", struct.pack("<Q", cgroup), CGROUP_HEAD.size + WALK_ROOM)
        if found is None:
            return None
        at, _, ready, _ = CGROUP_HEAD.unpack_from(found)
        return _walked(found, CGROUP_HEAD.size, at) if ready else None

    def program(self, key: int) -> KernelProgram | None:
        """Return the program behind a key, None when it was forgotten."""
        found = self._object.lookup("stella_programs", struct.pack("<Q", key), PROGRAM_HEAD.size + WALK_ROOM)
        if found is None:
            return None
        inode, device, at, flags, ready = PROGRAM_HEAD.unpack_from(found)
        return KernelProgram(_walked(found, PROGRAM_HEAD.size, at), device, inode, flags) if ready else None


class Former(Reading):
    """A run whose programs cannot be gone on with: it is detached and read to its end."""

    def __init__(
        self, lib: Libbpf, pinned: Pinned, lanes: int, ring_bytes: int, *, libraries: list[str], counted: Iterable[str]
    ) -> None:
        super().__init__(lib, pinned, lanes, ring_bytes)
        self._pinned = pinned
        self._libraries = libraries
        self._counted = [name for name in counted if name in pinned.programs]

    @property
    def libraries(self) -> list[str]:
        return self._libraries

    def counted(self) -> Iterable[str]:
        return self._counted

    def flush(self) -> int:
        program = self._pinned.programs.get(_FLUSH)
        if program is None:
            return 0
        context = bytearray(16)
        program.run(context)
        return int.from_bytes(context[8:16], "little")

    def detach(self) -> None:
        # Entry sides go before exit sides.
        for link in reversed(self._pinned.links.values()):
            link.close()
        self._pinned.links.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close_reading()
        self._pinned.close()


def _walked(value: bytes, head: int, at: int) -> str:
    return text(value[head + at : head + WALK_MAX])
