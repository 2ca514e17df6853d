"""Programs, maps and links: of an object file that is loaded, or of one that a former collector left pinned.

    Object    open a file, set map sizes, load
    Pinned    the same programs and maps, opened by the names under which they are pinned: nothing is loaded

Links are descriptors of the kernel's own, so both attach in the same way, and each link can be pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from ctypes import c_bool, c_char_p, c_int, c_long, c_size_t, c_uint32, c_uint64, c_ulong, c_void_p
from pathlib import Path
from typing import Any, Final

from stella_collector.libbpf import (
    INFO_RECURSION_MISSES,
    INFO_RUN_TIME_NS,
    INFO_SIZE,
    Libbpf,
    kernel_error,
)
from stella_shared.errors import NotFound, NotPermitted, StellaError
from stella_shared.system_call_numbers import NUMBERS

# enum bpf_attach_type
_PERF_EVENT, _UPROBE_MULTI = 41, 48
_PERF_TYPE_TRACEPOINT: Final = 2
_PERF_EVENT_IOC_ENABLE: Final = 0x2400
_PERF_FLAG_FD_CLOEXEC: Final = 8
#: struct perf_event_attr up to config2 (PERF_ATTR_SIZE_VER1).
_PERF_ATTR: Final = struct.Struct("<II5QIIQQ")
_TRACING: Final = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_UPROBE: Final = Path("/sys/bus/event_source/devices/uprobe")
_UPROBE_HINT: Final = (
    "uprobes need CAP_SYS_ADMIN on current kernels, beside CAP_BPF and CAP_PERFMON; run as root, or switch this probe "
    "off"
)
#: What a pinned map's, program's and link's name begins with.  A bpf file system takes no dots.
MAP_PIN, PROGRAM_PIN, LINK_PIN = "map-", "program-", "link-"


class _TestRunOpts(ctypes.Structure):
    # struct bpf_test_run_opts of bpf.h
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class _UprobeOpts(ctypes.Structure):
    # struct bpf_uprobe_opts of libbpf.h
    _fields_ = (
        ("sz", c_size_t),
        ("ref_ctr_offset", c_size_t),
        ("bpf_cookie", c_uint64),
        ("retprobe", c_bool),
        ("func_name", c_char_p),
        ("attach_mode", c_int),
    )


class _Cookie(ctypes.Structure):
    _fields_ = (("bpf_cookie", c_uint64),)


class _Many(ctypes.Structure):
    _fields_ = (
        ("flags", c_uint32),
        ("cnt", c_uint32),
        ("path", c_char_p),
        ("offsets", c_void_p),
        ("ref_ctr_offsets", c_void_p),
        ("cookies", c_void_p),
        ("pid", c_uint32),
    )


class _Target(ctypes.Union):
    _fields_ = (("perf_event", _Cookie), ("uprobe_multi", _Many))


class _LinkOpts(ctypes.Structure):
    # struct bpf_link_create_opts of bpf.h
    _fields_ = (
        ("sz", c_size_t),
        ("flags", c_uint32),
        ("iter_info", c_void_p),
        ("iter_info_len", c_uint32),
        ("target_btf_id", c_uint32),
        ("target", _Target),
    )


class Link:
    """An attached program.  `close` detaches it; so does the end of this process, unless it is pinned."""

    def __init__(self, lib: Libbpf, fd: int, *, handle: int | None = None, pinned: Path | None = None) -> None:
        self._lib = lib
        self._fd = fd
        self._handle = handle
        self.pinned = pinned

    def pin(self, path: Path) -> None:
        """Have it outlive this process, under this name in a bpf file system."""
        self._lib.pin(self._fd, path)
        self.pinned = path

    def close(self) -> None:
        """Detach.  Idempotent."""
        if self._fd < 0:
            return
        if self.pinned is not None:
            self.pinned.unlink(missing_ok=True)
        if self._handle is not None:
            self._lib.bpf_link__destroy(self._handle)
        else:
            os.close(self._fd)
        self._fd = -1


class Program:
    """One program.  `handle` is libbpf's, of an object of this process; `fd` is that of a pinned one."""

    def __init__(self, lib: Libbpf, name: str, *, handle: int | None = None, fd: int = -1) -> None:
        self._lib = lib
        self._handle = handle
        self._fd = fd
        self.name = name

    @property
    def fd(self) -> int:
        """Its descriptor, negative when it is not loaded."""
        return self._fd if self._handle is None else int(self._lib.bpf_program__fd(self._handle))

    def set_autoload(self, wanted: bool) -> None:
        """Leave this program out of the load, or not.  Before `Object.load` only."""
        self._lib.bpf_program__set_autoload(self._handle, wanted)

    # ---- attaching

    def attach(self, what: str) -> Link:
        """Attach where the program's section says: a tracepoint with type information."""
        return self._link(int(self._lib.bpf_raw_tracepoint_open(None, self.fd)), what)

    def attach_tracepoint(self, category: str, name: str) -> Link:
        """Attach to tracepoint `category`/`name` (needs tracefs)."""
        # A call is watched at its entry and at its exit; a failure names the entry, as configuration and runbook do.
        what = f"tracepoint/{category}/{name.replace('sys_exit_', 'sys_enter_')}"
        number = _number(*(root / "events" / category / name / "id" for root in _TRACING))
        attr = _PERF_ATTR.pack(_PERF_TYPE_TRACEPOINT, _PERF_ATTR.size, number, 0, 0, 0, 0, 0, 0, 0, 0)
        return self._link(number if number < 0 else self._perf_event(attr, -1, 0), what)

    def attach_uprobe(self, path: str, function: str, *, pid: int, returning: bool, cookie: int) -> Link:
        """Attach to `function` of the file at `path`, which is read, in process `pid` or in every process (-1)."""
        what = f"{'uretprobe' if returning else 'uprobe'}:{path}:{function}"
        opts = _UprobeOpts(
            sz=ctypes.sizeof(_UprobeOpts), bpf_cookie=cookie, retprobe=returning, func_name=function.encode()
        )
        handle = self._lib.bpf_program__attach_uprobe_opts(self._handle, pid, os.fsencode(path), 0, ctypes.byref(opts))
        if not handle:
            return self._link(-ctypes.get_errno(), what, _UPROBE_HINT)
        return Link(self._lib, int(self._lib.bpf_link__fd(handle)), handle=handle)

    def attach_uprobe_at(self, path: str, offset: int, what: str, *, pid: int, returning: bool, cookie: int) -> Link:
        """Attach at an offset of the file at `path`, which is not read.  `what` names it for people."""
        name = ctypes.create_string_buffer(os.fsencode(path))
        number = _number(_UPROBE / "type")
        attr = _PERF_ATTR.pack(
            max(number, 0), _PERF_ATTR.size, int(returning), 0, 0, 0, 0, 0, 0, ctypes.addressof(name), offset
        )
        done = number if number < 0 else self._perf_event(attr, pid, cookie)
        return self._link(done, f"{'uretprobe' if returning else 'uprobe'}:{what}", _UPROBE_HINT)

    def attach_uprobe_multi(self, path: str, offsets: Sequence[int], cookies: Sequence[int], what: str) -> Link:
        """Attach at many offsets of the file at `path` by one link, in every process (Linux 6.6)."""
        return self._link(self._many(path, offsets, cookies), f"uprobe:{what}", _UPROBE_HINT)

    def takes_uprobe_multi(self) -> bool:
        """Return whether this kernel attaches many uprobes by one link.  It is asked for a probe that cannot be."""
        return self._many("/", [0], [0]) == -errno.EBADF

    def _many(self, path: str, offsets: Sequence[int], cookies: Sequence[int]) -> int:
        count = len(offsets)
        places, ids = (c_ulong * count)(*offsets), (c_uint64 * count)(*cookies)
        many = _Many(cnt=count, path=os.fsencode(path), offsets=ctypes.addressof(places), cookies=ctypes.addressof(ids))
        opts = _LinkOpts(sz=ctypes.sizeof(_LinkOpts), target=_Target(uprobe_multi=many))
        return int(self._lib.bpf_link_create(self.fd, 0, _UPROBE_MULTI, ctypes.byref(opts)))

    def _perf_event(self, attr: bytes, pid: int, cookie: int) -> int:
        """Return the descriptor of a link to a new perf event, which the link holds; a negative errno."""
        cpu = 0 if pid < 0 else -1
        number = NUMBERS[platform.machine()]["perf_event_open"]
        event = int(
            _libc.syscall(c_long(number), attr, c_int(pid), c_int(cpu), c_int(-1), c_ulong(_PERF_FLAG_FD_CLOEXEC))
        )
        if event < 0:
            return -ctypes.get_errno()
        try:
            opts = _LinkOpts(sz=ctypes.sizeof(_LinkOpts), target=_Target(perf_event=_Cookie(cookie)))
            link = int(self._lib.bpf_link_create(self.fd, event, _PERF_EVENT, ctypes.byref(opts)))
            if link >= 0:
                fcntl.ioctl(event, _PERF_EVENT_IOC_ENABLE, 0)
            return link
        finally:
            os.close(event)

    def _link(self, done: int, what: str, hint: str = "") -> Link:
        """Return the link with a descriptor, or raise what a negative errno means."""
        if done < 0:
            error = kernel_error(f"Failed to attach {what}", -done)
            if hint and isinstance(error, NotPermitted):
                error.hint = hint
            raise error
        return Link(self._lib, done)

    # ---- running, and what the kernel counts

    def run(self, context: bytearray) -> None:
        """Run this program here and now, in this thread.  It may write to its context, which is then `context`."""
        data = (ctypes.c_char * len(context)).from_buffer(context)
        opts = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts), ctx_in=ctypes.addressof(data), ctx_size_in=len(context))
        if error := self._lib.bpf_prog_test_run_opts(self.fd, ctypes.byref(opts)):
            raise kernel_error(f"cannot run program {self.name}", -error)

    def recursion_misses(self) -> int:
        """Return how often the kernel skipped this program because it was already running on that CPU."""
        return int(struct.unpack_from("<Q", self._info(), INFO_RECURSION_MISSES)[0])

    def run_time(self) -> tuple[int, int]:
        """Return (nanoseconds, runs) as counted while `Libbpf.count_run_time` was on."""
        nanoseconds, runs = struct.unpack_from("<QQ", self._info(), INFO_RUN_TIME_NS)
        return int(nanoseconds), int(runs)

    def _info(self) -> bytes:
        info = ctypes.create_string_buffer(INFO_SIZE)
        size = c_uint32(INFO_SIZE)
        fd = self.fd
        if fd < 0 or self._lib.bpf_prog_get_info_by_fd(fd, info, ctypes.byref(size)):
            return bytes(INFO_SIZE)
        return info.raw


class Maps(ABC):
    """Maps and programs in the kernel."""

    def __init__(self, lib: Libbpf) -> None:
        self._lib = lib
        self.programs: dict[str, Program] = {}

    @abstractmethod
    def map_names(self) -> list[str]:
        """Return the names of all maps."""

    @abstractmethod
    def map_fd(self, name: str) -> int:
        """Return the descriptor of a map, which stays ours.  A name with a dot is the end of one: `.bss`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of programs and maps.  Idempotent."""

    def pin(self, folder: Path) -> None:
        """Pin every map and every loaded program in a folder of a bpf file system."""
        for name in self.map_names():
            self._lib.pin(self.map_fd(name), folder / (MAP_PIN + name.replace(".", "+")))
        for name, program in self.programs.items():
            if program.fd >= 0:
                self._lib.pin(program.fd, folder / (PROGRAM_PIN + name))

    def update(self, name: str, key: bytes, value: bytes) -> None:
        """Put `value` under `key`."""
        if self._lib.bpf_map_update_elem(self.map_fd(name), key, value, 0):
            raise kernel_error(f"cannot write map {name}", ctypes.get_errno())

    def lookup(self, name: str, key: bytes, size: int) -> bytes | None:
        """Return the value of `size` bytes under `key`, None when there is none."""
        value = ctypes.create_string_buffer(size)
        if self._lib.bpf_map_lookup_elem(self.map_fd(name), key, value):
            return None
        return value.raw

    def update_many(self, name: str, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Put each value under its key, in one go."""
        count = c_uint32(len(keys))
        if self._lib.bpf_map_update_batch(
            self.map_fd(name), b"".join(keys), b"".join(values), ctypes.byref(count), None
        ):
            raise kernel_error(f"cannot write map {name}", ctypes.get_errno())

    def keys(self, name: str, key_bytes: int) -> Iterator[bytes]:
        """Yield the keys that a map has now."""
        fd, key = self.map_fd(name), ctypes.create_string_buffer(key_bytes)
        before: Any = None
        while not self._lib.bpf_map_get_next_key(fd, before, key):
            yield key.raw
            before = ctypes.create_string_buffer(key.raw, key_bytes)

    def entries(self, name: str, key_bytes: int) -> int:
        """Return how many keys a map has now."""
        return sum(1 for _ in self.keys(name, key_bytes))

    def delete(self, name: str, key: bytes) -> None:
        """Remove `key`; a key that is not there is fine."""
        self._lib.bpf_map_delete_elem(self.map_fd(name), key)


class Object(Maps):
    """A BPF object file: opened, configured, then loaded.  Closing it removes what is not pinned."""

    def __init__(self, lib: Libbpf, path: Path) -> None:
        super().__init__(lib)
        self._handle: int | None = lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise kernel_error(f"cannot open BPF object {path}", ctypes.get_errno())
        self._maps: dict[str, int] = {}
        handle: int | None = None
        while handle := lib.bpf_object__next_map(self._handle, handle):
            self._maps[lib.bpf_map__name(handle).decode()] = handle
        handle = None
        while handle := lib.bpf_object__next_program(self._handle, handle):
            name = lib.bpf_program__name(handle).decode()
            self.programs[name] = Program(lib, name, handle=handle)

    def map_names(self) -> list[str]:
        return list(self._maps)

    def _map(self, name: str) -> int:
        return self._maps[_full_name(self._maps, name)]

    def set_max_entries(self, name: str, entries: int) -> None:
        """Size a map.  Before `load` only."""
        if error := self._lib.bpf_map__set_max_entries(self._map(name), entries):
            raise kernel_error(f"cannot size map {name} to {entries}", -error)

    def load(self) -> None:
        """Load every program that is left in, and make the maps."""
        if error := self._lib.bpf_object__load(self._handle):
            raise kernel_error("the kernel refuses to load the BPF programs", -error)

    def map_fd(self, name: str) -> int:
        return int(self._lib.bpf_map__fd(self._map(name)))

    def close(self) -> None:
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None


class Pinned(Maps):
    """What `Maps.pin` left in a folder.  Raises `NotFound` when there is nothing of it."""

    def __init__(self, lib: Libbpf, folder: Path) -> None:
        super().__init__(lib)
        self._maps: dict[str, int] = {}
        self.links: dict[str, Link] = {}
        try:
            for pin in sorted(folder.iterdir()):
                kind, _, name = pin.name.partition("-")
                fd = lib.open_pinned(pin)
                if f"{kind}-" == MAP_PIN:
                    self._maps[name.replace("+", ".")] = fd
                elif f"{kind}-" == PROGRAM_PIN:
                    self.programs[name] = Program(lib, name, fd=fd)
                elif f"{kind}-" == LINK_PIN:
                    self.links[pin.name] = Link(lib, fd, pinned=pin)
                else:
                    os.close(fd)
        except (OSError, StellaError):
            self.close()
            raise
        if not self._maps:
            raise NotFound(f"nothing is pinned at {folder}")

    def map_names(self) -> list[str]:
        return list(self._maps)

    def map_fd(self, name: str) -> int:
        return self._maps[_full_name(self._maps, name)]

    def close(self) -> None:
        for fd in (*self._maps.values(), *(program.fd for program in self.programs.values())):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._maps.clear()
        self.programs.clear()


def _full_name(names: dict[str, int], name: str) -> str:
    # Data sections are called <object>.rodata and so on, with the object's name cut short.
    for known in names:
        if known == name or (name.startswith(".") and known.endswith(name)):
            return known
    raise NotFound(f"the BPF object has no map {name}")


def _number(*files: Path) -> int:
    """Return the number in the first of these files that can be read, else a negative errno."""
    error = errno.ENOENT
    for file in files:
        try:
            return int(file.read_text())
        except OSError as e:
            # A file system that is not there says less than one that is closed to us.
            error = e.errno or error if error == errno.ENOENT else error
    return -error


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
