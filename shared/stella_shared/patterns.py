"""Allow and deny lists of paths and networks: what the kernel can decide, and the rest.

A path pattern is a list of segments: `**` is any number of them, `*` and `?` stand for any text and any one
character within one.  `/etc/**` is everything below /etc (not /etc itself), `/etc/passwd` is that file,
`/srv/*/log/**` is everything below each log folder.

    allow, deny ──compile_paths──> prefixes for the kernel's tries + PathFilter for what it lets through

The kernel compares the text as the program gave it; `PathFilter` sees through `//` and `/./` as well.
Deny wins over allow; an empty allow list allows all.  What cannot be decided is accepted: too much evidence
can be sifted later, dropped evidence cannot be had back.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import msgspec

_WILD = re.compile(r"[*?]")
_CACHE_ENTRIES: Final = 4096


class CompiledPaths(msgspec.Struct, frozen=True):
    """What `compile_paths` returns.

    The kernel lets a path through when it begins with one of `allow_prefixes` (any path, when `allow_all`)
    and with none of `deny_prefixes`.  When `kernel_decides` nothing is left for `filter` to refuse.
    """

    allow_prefixes: tuple[bytes, ...]
    deny_prefixes: tuple[bytes, ...]
    allow_all: bool
    kernel_decides: bool
    filter: PathFilter


def split(pattern: str) -> tuple[str, bool]:
    """Return the literal text before the first wildcard, and whether that prefix alone decides.

    It does for `<folder>/**`, whose prefix is `<folder>/`.  Raises `ValueError` for what is no pattern.
    """
    if not pattern.startswith("/"):
        raise ValueError("a path pattern begins with /")
    if "\0" in pattern:
        raise ValueError("a path holds no NUL")
    segments = pattern[1:].split("/")
    for segment in segments:
        if segment in ("", ".", ".."):
            raise ValueError("a path pattern has no empty, . or .. segment" + _slash_hint(pattern))
        if "**" in segment and segment != "**":
            raise ValueError("** stands alone between slashes, as in /srv/**/*.log")
    wild = _WILD.search(pattern)
    if wild is None:
        return pattern, False
    return pattern[: wild.start()], pattern[wild.start() :] == "**"


def _slash_hint(pattern: str) -> str:
    return f"; did you mean {pattern}**?" if pattern.endswith("/") and "//" not in pattern else ""


def compile_paths(allow: Iterable[str], deny: Iterable[str], max_prefix_bytes: int = 4096) -> CompiledPaths:
    """Compile both lists for a kernel that compares at most `max_prefix_bytes` bytes."""
    allow, deny = list(allow), list(deny)
    allow_splits = [(os.fsencode(prefix), exact) for prefix, exact in map(split, allow)]
    deny_splits = [(os.fsencode(prefix), exact) for prefix, exact in map(split, deny)]
    short_enough = [len(prefix) <= max_prefix_bytes for prefix, _ in allow_splits + deny_splits]
    return CompiledPaths(
        allow_prefixes=tuple(sorted({prefix[:max_prefix_bytes] for prefix, _ in allow_splits})),
        deny_prefixes=tuple(
            sorted({prefix for prefix, exact in deny_splits if exact and len(prefix) <= max_prefix_bytes})
        ),
        allow_all=not allow,
        kernel_decides=all(short_enough) and all(exact for _, exact in allow_splits + deny_splits),
        filter=PathFilter(allow, deny),
    )


class PathFilter:
    """`decide(path)` is true when the path is recorded.

    A relative path, or one with `..` in it, is not decidable from its text and is accepted.
    """

    def __init__(self, allow: Iterable[str], deny: Iterable[str]) -> None:
        self._allow = _Patterns(allow)
        self._deny = _Patterns(deny)
        self._empty_allow = self._allow.empty
        self.decide: Callable[[str], bool] = lru_cache(_CACHE_ENTRIES)(self._decide)

    def _decide(self, path: str) -> bool:
        if not path.startswith("/"):
            return True
        if "//" in path or "/." in path:
            segments = path.split("/")
            if ".." in segments:
                return True
            slash = "/" if segments[-1] in ("", ".") else ""
            path = "/" + "/".join(s for s in segments if s not in ("", ".")) + slash
        if self._deny.match(path):
            return False
        return self._empty_allow or self._allow.match(path)


class _Patterns:
    """A list of path patterns, the simple ones first."""

    def __init__(self, patterns: Iterable[str]) -> None:
        prefixes: list[str] = []
        literals: set[str] = set()
        self._globs: list[_Glob] = []
        for pattern in patterns:
            prefix, exact = split(pattern)
            if exact:
                prefixes.append(prefix)
            elif prefix == pattern:
                literals.add(pattern)
            else:
                self._globs.append(_Glob(pattern, prefix))
        self._prefixes = tuple(prefixes)
        self._literals = frozenset(literals)
        self.empty = not (prefixes or literals or self._globs)

    def match(self, path: str) -> bool:
        """True when any pattern matches `path`, which has no empty, `.` or `..` segments."""
        if path.startswith(self._prefixes):
            return True
        return path in self._literals or any(glob.match(path) for glob in self._globs)


class _Glob:
    """One pattern with wildcards in the middle, matched in time linear in the path for each block.

    Segments between two `**` form a block of fixed length.  Taking each block at its first place from the
    left leaves the most room for the rest: no backtracking is needed, and a hostile path costs little.
    """

    def __init__(self, pattern: str, prefix: str) -> None:
        self._prefix = prefix
        segments = pattern[1:].split("/")
        blocks: list[list[Callable[[str], bool]]] = [[]]
        for segment in segments:
            if segment == "**":
                blocks.append([])
            else:
                blocks[-1].append(_segment_matcher(segment))
        self._head, *self._middle = blocks
        self._tail = self._middle.pop() if self._middle else None
        #: A final `**` stands for at least one segment: `/srv/*/**` is what lies below.
        self._below = segments[-1] == "**"

    def match(self, path: str) -> bool:
        if not path.startswith(self._prefix):
            return False
        segments = path[1:].split("/") if path != "/" else []
        if self._tail is None:
            return len(segments) == len(self._head) and _fits(self._head, segments, 0)
        end = len(segments) - len(self._tail) - self._below
        at = len(self._head)
        if at > end or not _fits(self._head, segments, 0):
            return False
        for block in self._middle:
            while at + len(block) <= end and not _fits(block, segments, at):
                at += 1
            at += len(block)
            if at > end:
                return False
        return self._below or _fits(self._tail, segments, end)


def _fits(block: list[Callable[[str], bool]], segments: list[str], at: int) -> bool:
    return all(matches(segments[at + i]) for i, matches in enumerate(block))


def _segment_matcher(segment: str) -> Callable[[str], bool]:
    """Return the test of one segment.  Atomic groups take each `*` at its shortest: no backtracking."""
    if _WILD.search(segment) is None:
        return segment.__eq__
    parts = [re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", segment)]
    head, *rest = parts
    if not rest:
        expression = head
    else:
        *middle, tail = rest
        expression = head + "".join(f"(?>.*?{part})" for part in middle) + f".*{tail}"
    compiled = re.compile(expression, re.DOTALL)
    return lambda text: compiled.fullmatch(text) is not None


class NetworkFilter:
    """`decide(address)` is true when connections with this peer are recorded.

    Text that is no IP address (a UNIX socket's name) is accepted.  ::ffff:a.b.c.d counts as a.b.c.d.
    """

    def __init__(self, allow: Iterable[str], deny: Iterable[str]) -> None:
        self._allow = [ip_network(text) for text in allow]
        self._deny = [ip_network(text) for text in deny]
        self.decide: Callable[[str], bool] = lru_cache(_CACHE_ENTRIES)(self._decide)

    def _decide(self, text: str) -> bool:
        try:
            address = ip_address(text.partition("%")[0])
        except ValueError:
            return True
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if _within(address, self._deny):
            return False
        return not self._allow or _within(address, self._allow)


def _within(address: IPv4Address | IPv6Address, networks: list[IPv4Network | IPv6Network]) -> bool:
    return any(address in network for network in networks)
