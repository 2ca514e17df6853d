"""Which files are of interest, by their paths: watched binaries, and the libraries of the built-in probes.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from stella_shared.config import Signals, WatchedFunctions
from stella_shared.patterns import PathFilter

BUILD_ID_PREFIX: Final = "build-id:"
_LIBSSL: Final = re.compile(r"/libssl[-.][^/ ]*so[^/ ]*$|/libssl\.so[^/ ]*$")
_LIBC: Final = re.compile(r"/libc\.so\.6$|/libc-2\.\d+\.so$|/ld-musl-[^/]*\.so\.1$|/libc\.musl-[^/]*\.so\.1$")


class Library(msgspec.Struct, frozen=True):
    """A built-in probe that hooks library functions: (entry program, return program, function)."""

    probe: str
    library: str
    functions: tuple[tuple[str, str, str], ...]


class Entry:
    """One entry of `signals.probes.functions`.  `build_id` is "" when a path is asked for."""

    def __init__(self, number: int, asked: WatchedFunctions) -> None:
        self.number = number
        self.asked = asked
        by_build_id = asked.binary.startswith(BUILD_ID_PREFIX)
        self.build_id = asked.binary.removeprefix(BUILD_ID_PREFIX) if by_build_id else ""
        self._paths = None if by_build_id else PathFilter([asked.binary], [])

    @property
    def glob(self) -> str:
        """The path or glob, "" when a build-id is asked for."""
        return "" if self.build_id else self.asked.binary

    def may_be(self, paths: Iterable[str], *, own: bool) -> bool:
        """Return whether a file that goes by these paths may be meant; with a build-id, any file may.

        With `image`, the node's own files are not.
        """
        if self.asked.image and own:
            return False
        return self._paths is None or any(path.startswith("/") and self._paths.decide(path) for path in paths)


class Interest(msgspec.Struct, frozen=True):
    """Why a file is looked at: entries, and built-in probes."""

    entries: tuple[Entry, ...]
    libraries: tuple[Library, ...]

    def __bool__(self) -> bool:
        return bool(self.entries or self.libraries)


class Chooser:
    """Decides by path.  `libraries` are the built-in probes that are wanted and loaded."""

    def __init__(self, signals: Signals, libraries: Sequence[Library]) -> None:
        self.entries = [Entry(n, asked) for n, asked in enumerate(signals.probes.functions)]
        self.libraries = tuple(libraries)
        self._configured = frozenset(signals.probes.openssl_libraries)

    def interest(self, paths: Sequence[str], *, own: bool, is_program: bool) -> Interest:
        """Return what a file may be wanted for.  Programs may have a library linked into them."""
        wanted = tuple(
            library
            for library in self.libraries
            if is_program or any(self._is(library.library, path) for path in paths)
        )
        return Interest(tuple(e for e in self.entries if e.may_be(paths, own=own)), wanted)

    def _is(self, library: str, path: str) -> bool:
        if library == "libssl":
            return path in self._configured or _LIBSSL.search(path) is not None
        return _LIBC.search(path) is not None
