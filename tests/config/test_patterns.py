"""Allow and deny lists, against a slow and obvious reference."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stella_shared.patterns import NetworkFilter, PathFilter, compile_paths, split


def slow_match(pattern: list[str], path: list[str]) -> bool:
    """The meaning of a pattern, by trying everything."""
    if not pattern:
        return not path
    if pattern == ["**"]:
        return bool(path)
    if pattern[0] == "**":
        return any(slow_match(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and slow_match(pattern[1:], path[1:])


def slow_decide(allow: list[str], deny: list[str], path: str) -> bool:
    if not path.startswith("/"):
        return True
    segments = path[1:].split("/")
    if any(slow_match(p[1:].split("/"), segments) for p in deny):
        return False
    return not allow or any(slow_match(p[1:].split("/"), segments) for p in allow)


_SEGMENTS = st.sampled_from(["**", "*", "a", "b", "ab", "a*", "*b", "a*b", "?", "a?", "*a*b*", "etc"])
_PATTERNS = st.lists(_SEGMENTS, min_size=1, max_size=5).map(lambda s: "/" + "/".join(s))
_LISTS = st.lists(_PATTERNS, max_size=3)
_PATHS = st.lists(st.text("abe", min_size=1, max_size=4), min_size=1, max_size=6).map(lambda s: "/" + "/".join(s))


@given(_LISTS, _LISTS, _PATHS)
def test_the_filter_agrees_with_the_reference(allow: list[str], deny: list[str], path: str) -> None:
    """Whatever the lists, the quick filter decides as the slow one does."""
    assert slow_decide(allow, deny, path) == PathFilter(allow, deny).decide(path)


@given(_LISTS, _LISTS, _PATHS, st.integers(1, 12))
def test_the_kernels_prefixes_never_refuse_what_is_wanted(
    allow: list[str], deny: list[str], path: str, limit: int
) -> None:
    """The kernel lets through all that the filter accepts, and exactly that where it decides alone."""
    compiled = compile_paths(allow, deny, limit)
    raw = path.encode()
    kernel = compiled.allow_all or raw.startswith(compiled.allow_prefixes)
    kernel = kernel and not raw.startswith(compiled.deny_prefixes)
    wanted = compiled.filter.decide(path)
    assert kernel or not wanted
    if compiled.kernel_decides:
        assert wanted == kernel


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("/etc/**", ("/etc/", True)),
        ("/**", ("/", True)),
        ("/etc/passwd", ("/etc/passwd", False)),
        ("/etc/*.conf", ("/etc/", False)),
        ("/srv/*/log/**", ("/srv/", False)),
        ("/a/**/b", ("/a/", False)),
        ("/lib/x?", ("/lib/x", False)),
    ],
)
def test_split_says_what_the_kernel_can_decide(pattern: str, expected: tuple[str, bool]) -> None:
    """The literal prefix, and whether it is all there is to the pattern."""
    assert expected == split(pattern)


@pytest.mark.parametrize("pattern", ["etc/**", "", "/", "/etc/", "/a//b", "/a/../b", "/a\0"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    """Ambiguous patterns are refused rather than guessed at."""
    with pytest.raises(ValueError, match="path"):
        split(pattern)


@pytest.mark.parametrize("pattern", ["/a**", "/a/**b"])
def test_two_stars_stand_alone(pattern: str) -> None:
    """`**` within a segment has no agreed meaning and is refused."""
    with pytest.raises(ValueError, match="stands alone"):
        split(pattern)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/etc/passwd", True),
        ("/etc", False),
        ("/etcetera", False),
        ("/etc/secret/key", False),
        ("//etc//passwd", True),
        ("/./etc/./secret/x", False),
        ("/tmp/../etc/passwd", True),
        ("/etc/../tmp/x", True),
        ("relative", True),
        ("", True),
        ("/tmp/.hidden", False),
    ],
)
def test_deny_wins_and_what_cannot_be_decided_is_accepted(path: str, expected: bool) -> None:
    """Doubled slashes are seen through; relative paths and `..` are accepted."""
    assert expected == PathFilter(["/etc/**"], ["/etc/secret/**"]).decide(path)


def test_a_hostile_path_costs_little() -> None:
    """Patterns full of stars meet the longest path that fits them worst, within a tenth of a second."""
    deep = PathFilter(["/" + "/".join(["**", "a*a*a*a*a*a*b"] * 8) + "/**/c"], [])
    began = time.perf_counter()
    assert not deep.decide("/" + "/".join(["a" * 15] * 255))
    assert not deep.decide("/" + "a" * 4000)
    assert time.perf_counter() - began < 0.1


_V4 = st.ip_addresses(v=4).map(str)
_NETWORKS = st.lists(st.builds(lambda a, n: str(ip_network((a, n), strict=False)), _V4, st.integers(0, 32)), max_size=3)


@given(_NETWORKS, _NETWORKS, _V4)
def test_networks_agree_with_the_reference(allow: list[str], deny: list[str], address: str) -> None:
    """Deny wins over allow; an empty allow list allows all; IPv4 inside IPv6 counts as IPv4."""
    inside = [ip_address(address) in ip_network(n) for n in allow]
    expected = (any(inside) or not allow) and not any(ip_address(address) in ip_network(n) for n in deny)
    decide = NetworkFilter(allow, deny).decide
    assert expected == decide(address)
    assert expected == decide(f"::ffff:{address}")


def test_other_families_are_told_apart() -> None:
    """IPv6 networks hold IPv6 alone, zones are ignored, UNIX names are accepted."""
    decide = NetworkFilter([], ["127.0.0.0/8", "::1", "fe80::/10"]).decide
    assert [False, False, True, True, False] == [
        decide(a) for a in ("127.9.9.9", "::1", "2001:db8::1", "/run/x.sock", "fe80::1%eth0")
    ]
