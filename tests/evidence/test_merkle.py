"""The Merkle tree, the envelope, canonical JSON and file names: the format's small parts."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evidence.rfc6962 import LEAVES, ROOTS

from stella_shared.errors import BrokenPromise
from stella_shared.evidence import canonical, dsse, merkle, names


def naive_root(lines: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not lines:
        return sha256(b"").digest()
    if len(lines) == 1:
        return sha256(b"\0" + lines[0]).digest()
    k = 1
    while k * 2 < len(lines):
        k *= 2
    return sha256(b"\1" + naive_root(lines[:k]) + naive_root(lines[k:])).digest()


#: In Python and in C.
both = pytest.mark.parametrize("frontier", [merkle.Frontier, merkle.frontier])


@both
def test_the_shared_vectors_hold(frontier: Callable[[], merkle.Frontier]) -> None:
    """The frontier's roots are those of RFC 6962 implementations elsewhere."""
    tree = frontier()
    for leaf, root in zip(LEAVES, ROOTS[1:], strict=True):
        tree.add(merkle.leaves([leaf]))
        assert root == tree.root().hex()


@both
@settings(deadline=None)
@given(lines=st.lists(st.binary(max_size=8), max_size=130), cuts=st.lists(st.integers(0, 40), max_size=8))
def test_any_cut_of_the_lines_gives_the_recursive_root(
    frontier: Callable[[], merkle.Frontier], lines: list[bytes], cuts: list[int]
) -> None:
    """Added in pieces of any size, in each of the three ways, lines give the root of the definition."""
    tree = frontier()
    lines = [line.replace(b"\n", b" ") for line in lines]
    rest = list(lines)
    for way, cut in enumerate([*cuts, len(rest)]):
        part, rest = rest[:cut], rest[cut:]
        if way % 3 == 0:
            tree.add(merkle.leaves(part))
        elif way % 3 == 1:
            tree.add_packed(bytearray(b"".join(merkle.leaves(part))), len(part))
        else:
            tree.add_hashes(merkle.leaf_hashes(b"".join(line + b"\n" for line in part)))
    assert naive_root(lines) == tree.root()
    assert len(lines) == tree.size


@settings(deadline=None)
@given(st.lists(st.integers(0, 9000), max_size=9), st.randoms(use_true_random=False))
def test_the_leaves_in_c_are_those_of_hashlib(lengths: list[int], chance: random.Random) -> None:
    """Two at a time or alone, of any length: around a block's end, and beyond what is done two at a time."""
    lines = [chance.randbytes(length).replace(b"\n", b" ") for length in lengths]
    assert b"".join(merkle.leaves(lines)) == merkle.leaf_hashes(b"".join(line + b"\n" for line in lines))


def test_every_length_around_the_ends_of_blocks_has_the_right_leaf() -> None:
    """Each pair of lengths up to three blocks, and each length about where libcrypto takes over."""
    some = [bytes(n % 9 + 65 for n in range(length)) for length in range(200)]
    for shift in (0, 1, 7, 64, 130):
        lines = [line for pair in zip(some, some[shift:] + some[:shift], strict=True) for line in pair]
        assert b"".join(merkle.leaves(lines)) == merkle.leaf_hashes(b"".join(line + b"\n" for line in lines))
    lines = [b"x" * length for length in range(8100, 8300)]
    assert b"".join(merkle.leaves(lines)) == merkle.leaf_hashes(b"".join(line + b"\n" for line in lines))


def test_pae_is_the_one_of_the_specification() -> None:
    """The specification's own example."""
    assert dsse.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


@given(st.binary(max_size=300), st.binary(min_size=1, max_size=80))
def test_envelopes_come_back(payload: bytes, signature: bytes) -> None:
    """What is sealed opens to the same."""
    opened = dsse.open_envelope(dsse.seal(payload, "ab" * 32, signature))
    assert (payload, "ab" * 32, signature) == (opened.payload, opened.key_id, opened.signature)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e | {"extra": 1},
        lambda e: e | {"payloadType": "text/plain"},
        lambda e: e | {"signatures": e["signatures"] * 2},
        lambda e: e | {"signatures": []},
        lambda e: e | {"payload": e["payload"].rstrip("=")},
        lambda e: e | {"payload": base64.b64encode(b"x").decode()[:1] + "B=="},
        lambda e: e | {"payload": 7},
    ],
)
def test_envelopes_of_another_form_are_refused(change: object) -> None:
    """One signature, our payload type, strict base64, nothing more."""
    envelope = json.loads(dsse.seal(b"payload", "ab" * 32, b"sig"))
    with pytest.raises(ValueError, match=r"."):
        dsse.open_envelope(canonical.dumps(change(envelope)))  # type: ignore[operator]


@pytest.mark.parametrize("text", [b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":1,"a":1}', b'{"a":1.0}', b'{"a":"\\u0061"}'])
def test_only_the_canonical_text_loads(text: bytes) -> None:
    """Spacing, key order, doubled keys, number and escape forms: one text alone is accepted."""
    with pytest.raises(ValueError, match=r"^not canonical"):
        canonical.loads(text, dict)


def test_large_integers_travel_as_text() -> None:
    """Beyond 2^53-1 a JSON number is not exact everywhere."""
    assert canonical.dumps({"n": 2**53 - 1, "o": 2**53}) == b'{"n":9007199254740991,"o":"9007199254740992"}'


def test_what_json_cannot_hold_is_refused() -> None:
    """A broken promise, not a guess."""
    with pytest.raises(BrokenPromise):
        canonical.dumps({"n": float("nan")})


@given(st.integers(1, 10**9), st.sampled_from(names.KINDS))
def test_chunk_names_come_back(index: int, kind: str) -> None:
    """A name parses to what made it."""
    assert names.ChunkFile(index, kind) == names.parse_chunk_file(names.chunk_file(index, kind))


@pytest.mark.parametrize(
    "name",
    [
        "1.ndjson.zst",
        "000000.ndjson.zst",
        "0000001.ndjson.zst",
        "000001.ndjson.zst.tmp",
        "000001.txt",
        "000001.ndjson.zst\n",
        "x",
    ],
)
def test_other_names_are_no_chunk(name: str) -> None:
    """Only the one spelling of an index is a chunk's name."""
    assert names.parse_chunk_file(name) is None
