"""Which files are of interest: watched binaries, and the libraries of the built-in probes.  Pure.

A file is judged by its paths, and where an entry has an `image` by the container of the process that it was found in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
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

        With `image`, the node's own files are not, and others may be in a container of that image.
        """
        if self.asked.image and own:
            return False
        return self._paths is None or any(path.startswith("/") and self._paths.decide(path) for path in paths)


class Interest(msgspec.Struct, frozen=True):
    """Why a file is looked at: entries, and built-in probes.

    `left_out` are entries that mean such a file, but not in the container where it was found.
    """

    entries: tuple[Entry, ...]
    libraries: tuple[Library, ...]
    left_out: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries or self.libraries)

    def globs_of(self, numbers: Collection[int]) -> frozenset[str]:
        """Return the images that entries of these numbers ask for."""
        return frozenset(e.asked.image for e in self.entries if e.asked.image and e.number in numbers)

    def waits_for(self, build_id: str) -> frozenset[str]:
        """Return the images for which a file is taken once a container of them has it; `build_id` "" when not read."""
        return frozenset(e.asked.image for e in self.left_out if not build_id or e.build_id in ("", build_id))


class Chooser:
    """Decides by path and image.  `libraries` are the built-in probes that are wanted and loaded.

    `images` are the globs that entries ask for, with the containers that are of them now.
    """

    def __init__(self, signals: Signals, libraries: Sequence[Library]) -> None:
        self.entries = [Entry(n, asked) for n, asked in enumerate(signals.probes.functions)]
        self.libraries = tuple(libraries)
        self.images: dict[str, frozenset[str]] = {e.asked.image: frozenset() for e in self.entries if e.asked.image}
        self._configured = frozenset(signals.probes.openssl_libraries)

    def select(self, images: Mapping[str, frozenset[str]]) -> frozenset[str]:
        """Take up which containers are of each image; return those that are new to one of them."""
        before, self.images = self.images, {glob: images.get(glob, frozenset()) for glob in self.images}
        return frozenset(one for glob, ids in self.images.items() for one in ids - before[glob])

    def globs_of(self, container: str) -> frozenset[str]:
        """Return the images that entries ask for and a container is of."""
        return frozenset(glob for glob, ids in self.images.items() if container in ids)

    def interest(
        self, paths: Sequence[str], *, own: bool, is_program: bool, globs: Collection[str] = frozenset()
    ) -> Interest:
        """Return what a file may be wanted for.  Programs may have a library linked into them.

        `globs` are the images of the container it was found in.
        """
        wanted = tuple(
            library
            for library in self.libraries
            if is_program or any(self._is(library.library, path) for path in paths)
        )
        meant = [e for e in self.entries if e.may_be(paths, own=own)]
        here = tuple(e for e in meant if not e.asked.image or e.asked.image in globs)
        return Interest(here, wanted, tuple(e for e in meant if e not in here))

    def _is(self, library: str, path: str) -> bool:
        if library == "libssl":
            return path in self._configured or _LIBSSL.search(path) is not None
        return _LIBC.search(path) is not None
