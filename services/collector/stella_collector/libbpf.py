"""libbpf, through ctypes: the library itself, what it says of programs and links in the kernel, and its errors.

The library that was built with the package (`native/libbpf.so.1`) is preferred; a system library of at least
`MINIMUM` will do.  `objects.py` loads and attaches with it.  Every failure comes out as a `StellaError` that names the
object, the reason and the fix.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import struct
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final, NamedTuple

from stella_shared.errors import NotFound, NotPermitted, StellaError

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
    "bpf_map_create": (c_int, (c_int, c_char_p, c_uint32, c_uint32, c_uint32, c_void_p)),
    "bpf_obj_get": (c_int, (c_char_p,)),
    "bpf_obj_pin": (c_int, (c_int, c_char_p)),
    "bpf_link_create": (c_int, (c_int, c_int, c_int, c_void_p)),
    "bpf_raw_tracepoint_open": (c_int, (c_char_p, c_int)),
    "bpf_link__fd": (c_int, (c_void_p,)),
    "bpf_program__name": (c_char_p, (c_void_p,)),
    "bpf_program__set_autoload": (c_int, (c_void_p, c_bool)),
    "bpf_program__fd": (c_int, (c_void_p,)),
    "bpf_program__attach_uprobe_opts": (c_void_p, (c_void_p, c_int, c_char_p, c_size_t, c_void_p)),
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
INFO_RUN_TIME_NS = 192
INFO_RECURSION_MISSES = 208
INFO_SIZE = 224
# struct bpf_link_info: type, id, prog_id; the rest is up to the type.
_LINK_INFO_HEAD = struct.Struct("<III")
_LINK_INFO_SIZE = 128
_NAME_BYTES = 16
_STATS_RUN_TIME = 0
_ARRAY, _MMAPABLE = 2, 1 << 10


class _MapOpts(ctypes.Structure):
    # struct bpf_map_create_opts of bpf.h
    _fields_ = (
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
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
                info = self._info(self._lib.bpf_prog_get_info_by_fd, fd, INFO_SIZE)
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
        """Return a new descriptor of what is pinned at `path`; raises `NotFound`."""
        fd = int(self._lib.bpf_obj_get(os.fsencode(path)))
        if fd < 0:
            raise NotFound(f"nothing is pinned at {path}: {os.strerror(-fd)}")
        return fd

    def pin(self, fd: int, path: Path) -> None:
        """Pin a map, a program or a link at `path` in a bpf file system, so that it outlives this process."""
        if error := int(self._lib.bpf_obj_pin(fd, os.fsencode(path))):
            raise kernel_error(f"cannot pin {path}", -error)

    def create_memory(self, name: str, size: int) -> int:
        """Return the descriptor of a map that is `size` bytes of plain memory, to be mapped and pinned."""
        options = _MapOpts(sz=ctypes.sizeof(_MapOpts), map_flags=_MMAPABLE)
        pages = -(-size // mmap.PAGESIZE)
        fd = int(self._lib.bpf_map_create(_ARRAY, name.encode(), 4, mmap.PAGESIZE, pages, ctypes.byref(options)))
        if fd < 0:
            raise kernel_error(f"cannot make map {name} of {size} bytes", -fd)
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
