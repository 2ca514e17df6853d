"""libbpf, through ctypes: the one module that speaks to it.

Open an object, set its read-only data and map sizes, load it, attach programs, reach maps.  The library that
was built with the package (`native/libbpf.so.1`) is preferred; a system library of at least `MINIMUM` will
do.  Every failure comes out as a `StellaError` that names the object, the reason and the fix.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_ulong, c_void_p
from pathlib import Path
from typing import Any, Final, NamedTuple

from stella_shared.errors import BrokenPromise, NotFound, NotPermitted, StellaError

MINIMUM: Final = (1, 6)
NATIVE: Final = Path(__file__).parent / "native"

_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "libbpf_major_version": (c_uint32, ()),
    "libbpf_minor_version": (c_uint32, ()),
    "libbpf_version_string": (c_char_p, ()),
    "libbpf_set_print": (c_void_p, (c_void_p,)),
    "libbpf_num_possible_cpus": (c_int, ()),
    "bpf_object__open_file": (c_void_p, (c_char_p, c_void_p)),
    "bpf_object__load": (c_int, (c_void_p,)),
    "bpf_object__close": (None, (c_void_p,)),
    "bpf_object__next_map": (c_void_p, (c_void_p, c_void_p)),
    "bpf_object__next_program": (c_void_p, (c_void_p, c_void_p)),
    "bpf_map__name": (c_char_p, (c_void_p,)),
    "bpf_map__fd": (c_int, (c_void_p,)),
    "bpf_map__set_max_entries": (c_int, (c_void_p, c_uint32)),
    "bpf_map__initial_value": (c_void_p, (c_void_p, c_void_p)),
    "bpf_map__pin": (c_int, (c_void_p, c_char_p)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__attach": (c_void_p, (c_void_p,)),
    "bpf_program__attach_tracepoint": (c_void_p, (c_void_p, c_char_p, c_char_p)),
    "bpf_program__attach_uprobe_opts": (c_void_p, (c_void_p, c_int, c_char_p, c_size_t, c_void_p)),
    "bpf_program__attach_uprobe_multi": (c_void_p, (c_void_p, c_int, c_char_p, c_char_p, c_void_p)),
    "bpf_link__destroy": (c_int, (c_void_p,)),
    "bpf_map_lookup_elem": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_elem": (c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    "bpf_map_delete_elem": (c_int, (c_int, c_void_p)),
    "bpf_map_get_next_key": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_map_update_batch": (c_int, (c_int, c_void_p, c_void_p, c_void_p, c_void_p)),
    "bpf_prog_test_run_opts": (c_int, (c_int, c_void_p)),
    "bpf_prog_get_info_by_fd": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_enable_stats": (c_int, (c_int,)),
    "bpf_prog_get_next_id": (c_int, (c_uint32, c_void_p)),
    "bpf_prog_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_link_get_next_id": (c_int, (c_uint32, c_void_p)),
    "bpf_link_get_fd_by_id": (c_int, (c_uint32,)),
    "bpf_link_get_info_by_fd": (c_int, (c_int, c_void_p, c_void_p)),
    "bpf_link_detach": (c_int, (c_int,)),
    "ring_buffer__new": (c_void_p, (c_int, c_void_p, c_void_p, c_void_p)),
    "ring_buffer__consume": (c_int, (c_void_p,)),
    "ring_buffer__free": (None, (c_void_p,)),
}

#: int (*)(void *ctx, void *data, size_t size), libbpf's ring callback.
RING_CALLBACK = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)

# struct bpf_prog_info (linux/bpf.h): type, id, tag, name, run_time_ns and run_cnt, recursion_misses, and how long
# it is up to them.
_INFO_HEAD = struct.Struct("<II8s")
_INFO_NAME = 64
_INFO_RUN_TIME_NS = 192
_INFO_RECURSION_MISSES = 208
_INFO_SIZE = 224
# struct bpf_link_info: type, id, prog_id; the rest is up to the type.
_LINK_INFO_HEAD = struct.Struct("<III")
_LINK_INFO_SIZE = 128
_NAME_BYTES = 16
_STATS_RUN_TIME = 0


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


class _UprobeMultiOpts(ctypes.Structure):
    # struct bpf_uprobe_multi_opts of libbpf.h
    _fields_ = (
        ("sz", c_size_t),
        ("syms", c_void_p),
        ("offsets", c_void_p),
        ("ref_ctr_offsets", c_void_p),
        ("cookies", c_void_p),
        ("cnt", c_size_t),
        ("retprobe", c_bool),
        ("session", c_bool),
    )


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


_UPROBE_HINT: Final = (
    "uprobes need CAP_SYS_ADMIN on current kernels, beside CAP_BPF and CAP_PERFMON; run as root, or switch this probe "
    "off"
)


def _candidates() -> Iterator[str]:
    bundled = NATIVE / "libbpf.so.1"
    if bundled.exists():
        yield str(bundled)
    if found := ctypes.util.find_library("bpf"):
        yield found


class LoadedProgram(NamedTuple):
    """A program in the kernel: id, BPF_PROG_TYPE_*, the digest of its instructions, its name."""

    id: int
    type: int
    tag: str
    name: str


class Libbpf:
    """A libbpf that was found and checked.  `path` and `version` say which."""

    def __init__(self) -> None:
        seen: list[str] = []
        for path in _candidates():
            try:
                lib = ctypes.CDLL(path, use_errno=True)
            except OSError as e:
                seen.append(f"{path}: {e}")
                continue
            major = getattr(lib, "libbpf_major_version", None)
            version = (major(), lib.libbpf_minor_version()) if major else (0, 0)
            if version < MINIMUM:
                seen.append(f"{path}: version {version[0]}.{version[1]}")
                continue
            self.path = path
            self.version = f"{version[0]}.{version[1]}"
            break
        else:
            raise NotFound(
                f"libbpf {MINIMUM[0]}.{MINIMUM[1]} or newer was not found ({'; '.join(seen) or 'none at all'})",
                hint="run `make install` in the source tree: it builds one beside the collector",
            )
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype = result
            function.argtypes = arguments
        self._lib = lib
        lib.libbpf_set_print(None)  # failures are told by our own errors, with the thing and the fix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def possible_cpus(self) -> int:
        """Return the number of CPUs this kernel may ever bring up (lanes are laid out by it)."""
        return int(self._lib.libbpf_num_possible_cpus())

    def count_run_time(self) -> int:
        """Let the kernel time every program while the descriptor that is returned is open (BPF_ENABLE_STATS)."""
        fd = int(self._lib.bpf_enable_stats(_STATS_RUN_TIME))
        if fd < 0:
            raise kernel_error("the kernel does not time BPF programs", -fd)
        return fd

    def programs(self) -> Iterator[LoadedProgram]:
        """Yield every program in the kernel, whoever loaded it.  Raises `NotPermitted` without CAP_SYS_ADMIN."""
        for number in self._ids(self._lib.bpf_prog_get_next_id, "programs"):
            fd = int(self._lib.bpf_prog_get_fd_by_id(number))
            if fd < 0:
                continue  # gone since
            try:
                info = self._info(self._lib.bpf_prog_get_info_by_fd, fd, _INFO_SIZE)
            finally:
                os.close(fd)
            kind, _, tag = _INFO_HEAD.unpack_from(info)
            name = info[_INFO_NAME : _INFO_NAME + _NAME_BYTES].split(b"\0", 1)[0].decode(errors="replace")
            yield LoadedProgram(number, kind, tag.hex(), name)

    def links(self) -> Iterator[tuple[int, int]]:
        """Yield (link id, program id) of every link in the kernel, whoever made it."""
        for number in self._ids(self._lib.bpf_link_get_next_id, "links"):
            fd = int(self._lib.bpf_link_get_fd_by_id(number))
            if fd < 0:
                continue
            try:
                yield (
                    number,
                    _LINK_INFO_HEAD.unpack_from(self._info(self._lib.bpf_link_get_info_by_fd, fd, _LINK_INFO_SIZE))[2],
                )
            finally:
                os.close(fd)

    def detach_link(self, number: int) -> str:
        """Detach a link by its id; return "" or why the kernel does not (most kinds end with their holder only)."""
        fd = int(self._lib.bpf_link_get_fd_by_id(number))
        if fd < 0:
            return "" if -fd == errno.ENOENT else os.strerror(-fd).lower()
        try:
            error = int(self._lib.bpf_link_detach(fd))
        finally:
            os.close(fd)
        return os.strerror(-error).lower() if error else ""

    def _ids(self, next_id: Any, what: str) -> Iterator[int]:
        number = c_uint32(0)
        while True:
            error = int(next_id(number.value, ctypes.byref(number)))
            if error == -errno.ENOENT:
                return
            if error:
                raise kernel_error(f"the kernel's BPF {what} cannot be listed", -error)
            yield number.value

    def _info(self, get: Any, fd: int, size: int) -> bytes:
        info = ctypes.create_string_buffer(size)
        length = c_uint32(size)
        return info.raw if not get(fd, info, ctypes.byref(length)) else bytes(size)

    def open_pinned(self, path: Path) -> int:
        """Return a new descriptor of the pinned map at `path`; raises `NotFound`."""
        fd = int(self._lib.bpf_obj_get(os.fsencode(path)))
        if fd < 0:
            raise NotFound(f"no pinned map at {path}: {os.strerror(-fd)}")
        return fd


def kernel_error(what: str, number: int) -> StellaError:
    """Translate an errno of a refused BPF call into the error an operator can act on."""
    reason = os.strerror(number).lower()
    if number in (errno.EPERM, errno.EACCES):
        return NotPermitted(
            f"{what}: permission denied",
            hint="run as root, or give the service CAP_BPF and CAP_PERFMON (systemd: AmbientCapabilities=, "
            "compose: cap_add); file capabilities do nothing for a Python program",
        )
    if number == errno.ENOENT:
        return NotFound(f"{what}: no such event or symbol on this kernel or in this file")
    return StellaError(f"{what}: {reason}")


class Link:
    """An attached program.  `close` detaches it."""

    def __init__(self, lib: Libbpf, handle: int) -> None:
        self._lib = lib
        self._handle: int | None = handle

    def close(self) -> None:
        """Detach.  Idempotent."""
        if self._handle is not None:
            self._lib.bpf_link__destroy(self._handle)
            self._handle = None


class Program:
    """One program of a loaded object."""

    def __init__(self, lib: Libbpf, handle: int, name: str) -> None:
        self._lib = lib
        self._handle = handle
        self.name = name

    def set_autoload(self, wanted: bool) -> None:
        """Leave this program out of the load, or not.  Before `Object.load` only."""
        self._lib.bpf_program__set_autoload(self._handle, wanted)

    def _link(self, handle: int | None, what: str, hint: str = "") -> Link:
        if not handle:
            error = kernel_error(f"Failed to attach {what}", ctypes.get_errno())
            if hint and isinstance(error, NotPermitted):
                error.hint = hint
            raise error
        return Link(self._lib, handle)

    def attach(self, what: str) -> Link:
        """Attach where the program's section says."""
        return self._link(self._lib.bpf_program__attach(self._handle), what)

    def attach_tracepoint(self, category: str, name: str) -> Link:
        """Attach to tracepoint `category`/`name` (needs tracefs)."""
        handle = self._lib.bpf_program__attach_tracepoint(self._handle, category.encode(), name.encode())
        # A call is watched at its entry and at its exit; a failure names the entry, as configuration and runbook do.
        return self._link(handle, f"tracepoint/{category}/{name.replace('sys_exit_', 'sys_enter_')}")

    def attach_uprobe(self, path: str, function: str, *, pid: int, returning: bool, cookie: int) -> Link:
        """Attach to `function` of the file at `path`, in process `pid` or in every process (-1)."""
        opts = _UprobeOpts(
            sz=ctypes.sizeof(_UprobeOpts), bpf_cookie=cookie, retprobe=returning, func_name=function.encode()
        )
        handle = self._lib.bpf_program__attach_uprobe_opts(self._handle, pid, os.fsencode(path), 0, ctypes.byref(opts))
        return self._link(
            handle,
            f"{'uretprobe' if returning else 'uprobe'}:{path}:{function}",
            _UPROBE_HINT,
        )

    def attach_uprobe_at(self, path: str, offset: int, what: str, *, pid: int, returning: bool, cookie: int) -> Link:
        """Attach at an offset of the file at `path`, which is not read.  `what` names it for people."""
        opts = _UprobeOpts(sz=ctypes.sizeof(_UprobeOpts), bpf_cookie=cookie, retprobe=returning)
        handle = self._lib.bpf_program__attach_uprobe_opts(
            self._handle, pid, os.fsencode(path), offset, ctypes.byref(opts)
        )
        return self._link(handle, f"{'uretprobe' if returning else 'uprobe'}:{what}", _UPROBE_HINT)

    def attach_uprobe_multi(self, path: str, offsets: Sequence[int], cookies: Sequence[int], what: str) -> Link:
        """Attach at many offsets of the file at `path` by one link, in every process (Linux 6.6)."""
        count = len(offsets)
        places, ids = (c_ulong * count)(*offsets), (c_uint64 * count)(*cookies)
        opts = _UprobeMultiOpts(
            sz=ctypes.sizeof(_UprobeMultiOpts),
            offsets=ctypes.addressof(places),
            cookies=ctypes.addressof(ids),
            cnt=count,
        )
        handle = self._lib.bpf_program__attach_uprobe_multi(
            self._handle, -1, os.fsencode(path), None, ctypes.byref(opts)
        )
        return self._link(handle, f"uprobe:{what}", _UPROBE_HINT)

    def takes_uprobe_multi(self) -> bool:
        """Return whether this kernel attaches many uprobes by one link.  It is asked for a probe that cannot be."""
        with contextlib.suppress(StellaError):
            self.attach_uprobe_multi("/", [0], [0], "nothing").close()
        return ctypes.get_errno() == errno.EBADF

    def run(self, context: bytearray) -> None:
        """Run this program here and now, in this thread.  It may write to its context, which is then `context`."""
        data = (ctypes.c_char * len(context)).from_buffer(context)
        opts = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts), ctx_in=ctypes.addressof(data), ctx_size_in=len(context))
        fd = self._lib.bpf_program__fd(self._handle)
        if error := self._lib.bpf_prog_test_run_opts(fd, ctypes.byref(opts)):
            raise kernel_error(f"cannot run program {self.name}", -error)

    def recursion_misses(self) -> int:
        """Return how often the kernel skipped this program because it was already running on that CPU."""
        return int(struct.unpack_from("<Q", self._info(), _INFO_RECURSION_MISSES)[0])

    def run_time(self) -> tuple[int, int]:
        """Return (nanoseconds, runs) as counted while `Libbpf.count_run_time` was on."""
        nanoseconds, runs = struct.unpack_from("<QQ", self._info(), _INFO_RUN_TIME_NS)
        return int(nanoseconds), int(runs)

    def _info(self) -> bytes:
        info = ctypes.create_string_buffer(_INFO_SIZE)
        size = c_uint32(_INFO_SIZE)
        fd = self._lib.bpf_program__fd(self._handle)
        if fd < 0 or self._lib.bpf_prog_get_info_by_fd(fd, info, ctypes.byref(size)):
            return bytes(_INFO_SIZE)
        return info.raw


class Object:
    """A BPF object file: opened, configured, then loaded.  Closing it removes its programs and maps."""

    def __init__(self, lib: Libbpf, path: Path) -> None:
        self._lib = lib
        self._handle: int | None = lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise kernel_error(f"cannot open BPF object {path}", ctypes.get_errno())
        self._maps: dict[str, int] = {}
        handle: int | None = None
        while handle := lib.bpf_object__next_map(self._handle, handle):
            self._maps[lib.bpf_map__name(handle).decode()] = handle
        self.programs: dict[str, Program] = {}
        handle = None
        while handle := lib.bpf_object__next_program(self._handle, handle):
            name = lib.bpf_program__name(handle).decode()
            self.programs[name] = Program(lib, handle, name)

    def _map(self, name: str) -> int:
        # Data sections are called <object>.rodata and so on, with the object's name cut short.
        for known, handle in self._maps.items():
            if known == name or (name.startswith(".") and known.endswith(name)):
                return handle
        raise NotFound(f"the BPF object has no map {name}")

    def set_max_entries(self, name: str, entries: int) -> None:
        """Size a map.  Before `load` only."""
        if error := self._lib.bpf_map__set_max_entries(self._map(name), entries):
            raise kernel_error(f"cannot size map {name} to {entries}", -error)

    def set_data(self, section: str, value: bytes) -> None:
        """Write `value` over the start of data section `.rodata` or `.bss`.  Before `load` only.

        The compiler keeps constants of its own behind our variables, so the rest stays as it is.
        """
        size = c_size_t()
        start = self._lib.bpf_map__initial_value(self._map(section), ctypes.byref(size))
        if not start or size.value < len(value):
            raise BrokenPromise(f"{section} of the BPF object holds {size.value} bytes, not {len(value)}")
        ctypes.memmove(start, value, len(value))

    def load(self) -> None:
        """Load every program that is left in, and make the maps."""
        if error := self._lib.bpf_object__load(self._handle):
            raise kernel_error("the kernel refuses to load the BPF programs", -error)

    def map_fd(self, name: str) -> int:
        """Return the descriptor of a map.  The object owns it."""
        return int(self._lib.bpf_map__fd(self._map(name)))

    def pin(self, name: str, path: Path) -> None:
        """Pin a map at `path` in a bpf file system, so that it outlives this process."""
        if error := self._lib.bpf_map__pin(self._map(name), os.fsencode(path)):
            raise kernel_error(f"cannot pin map {name} at {path}", -error)

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

    def entries(self, name: str, key_bytes: int) -> int:
        """Return how many keys a map has now."""
        fd, key, count = self.map_fd(name), ctypes.create_string_buffer(key_bytes), 0
        before: Any = None
        while not self._lib.bpf_map_get_next_key(fd, before, key):
            before, count = ctypes.create_string_buffer(key.raw, key_bytes), count + 1
        return count

    def delete(self, name: str, key: bytes) -> None:
        """Remove `key`; a key that is not there is fine."""
        self._lib.bpf_map_delete_elem(self.map_fd(name), key)

    def close(self) -> None:
        """Remove programs and maps.  Detach links first.  Idempotent."""
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None
