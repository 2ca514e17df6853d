"""Inclusion proofs: the paths are those of the RFC, and a proof says one thing or nothing."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import pytest
from chain_maker import RUN, Node, Source, line, one, resign, small_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.signer.log_kit import Queue, surroundings

from stella_cli import commands
from stella_shared.errors import BadAnswer, NotFound, TryAgain, UsageError
from stella_shared.evidence import canonical, dsse, keys, merkle, proof
from stella_shared.evidence.merkle_paths import inclusion_paths, root_from_path
from stella_shared.evidence.proof import Proof
from stella_shared.evidence.prover import LineOf, Place, Prover, Wanted, place_of
from stella_shared.evidence.vouching import Trust

# The vectors that certificate-transparency implementations share: leaves, then (index, size, path).
_LEAVES = [bytes.fromhex(h) for h in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
_PATHS = [
    (0, 1, []),
    (0, 8, [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ]),
    (5, 8, [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ]),
    (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    (1, 5, [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ]),
]  # fmt: skip


def tree_root(hashes: list[bytes]) -> bytes:
    tree = merkle.Frontier()
    tree.add(hashes)
    return tree.root()


@pytest.mark.parametrize(("index", "size", "path"), _PATHS)
def test_the_shared_vectors_hold(index: int, size: int, path: list[str]) -> None:
    """Both ways: the path that is made, and the root that it leads to."""
    hashes = merkle.leaves(_LEAVES[:size])
    [made], root = inclusion_paths(b"".join(hashes), [index])
    assert path == [one.hex() for one in made]
    assert tree_root(hashes) == root == root_from_path(hashes[index], index, size, made)


@settings(deadline=None)
@given(st.integers(1, 140), st.data())
def test_every_leaf_has_a_path_to_the_root_and_no_other_place_has_it(size: int, data: st.DataObject) -> None:
    """Another index, another size, a hash more or less: no such leaf, or another root."""
    hashes = merkle.leaves([b"%d" % n for n in range(size)])
    index = data.draw(st.integers(0, size - 1))
    indexes = [index, *data.draw(st.lists(st.integers(0, size - 1), max_size=3))]
    paths, root = inclusion_paths(b"".join(hashes), indexes)
    assert tree_root(hashes) == root
    assert [root] * len(indexes) == [
        root_from_path(hashes[i], i, size, path) for i, path in zip(indexes, paths, strict=True)
    ]
    leaf, path = hashes[index], paths[0]
    elsewhere = data.draw(st.integers(0, size + 2).filter(lambda n: n != index))
    for i, n, wrong in (
        (elsewhere, size, path),
        (index, size, [*path, leaf]),
        (index, size, path[:-1] if path else [leaf]),
        (index, size, [*path[:-1], leaf] if path else [leaf]),
    ):
        with contextlib.suppress(ValueError):
            assert root != root_from_path(leaf, i, n, wrong)


@pytest.mark.parametrize(("index", "size"), [(-1, 3), (3, 3), (0, 0), (7, 3)])
def test_a_leaf_that_is_not_there_has_no_path(index: int, size: int) -> None:
    """Neither made nor accepted."""
    with pytest.raises(ValueError, match=r"leaves"):
        inclusion_paths(b"\0" * 32 * size, [index])
    with pytest.raises(ValueError, match=r"no leaf"):
        root_from_path(b"\0" * 32, index, size, [])


def test_the_empty_tree_has_its_root() -> None:
    """No leaf, no path."""
    assert ([], merkle.EMPTY_ROOT) == inclusion_paths(b"", [])


# -- proofs of a real chain ----------------------------------------------------------------------------


def trusted(node: Node) -> Trust:
    return Trust({node.made.key_id: ""})


def proofs_of(node: Node, *at: Place | LineOf) -> list[bytes]:
    return [proof.encode(made) for made in Prover(node.evidence).prove([Wanted(one) for one in at])]


def test_every_line_of_a_chain_is_proved_in_each_way(tmp_path: Path) -> None:
    """By its place, by its position, and by its text: the same proof, and it holds."""
    node = small_chain(tmp_path)
    prover = Prover(node.evidence)
    for chunk in (2, 3):
        lines = node.lines(chunk).splitlines()
        by_line = prover.prove([Wanted(LineOf(chunk, n)) for n in range(1, len(lines) + 1)])
        assert by_line == prover.prove([Wanted(place_of(text)) for text in lines])
        assert by_line == prover.prove([Wanted(place_of(text), text) for text in lines])
        for number, (text, made) in enumerate(zip(lines, by_line, strict=True), 1):
            proven = proof.verify(proof.encode(made), trusted(node))
            assert (text.decode(), chunk, number, len(lines)) == (
                proven.line, proven.chunk, proven.line_number, proven.lines
            )  # fmt: skip
            assert (node.made.chain_id, node.name, "") == (proven.chain_id, proven.node, proven.log)
    both = [Wanted(LineOf(3, 1)), Wanted(LineOf(2, 1)), Wanted(LineOf(3, 2))]
    assert [(3, 0), (2, 0), (3, 1)] == [(made.chunk, made.leaf_index) for made in prover.prove(both)]


def test_only_the_chunk_that_holds_the_line_is_read(tmp_path: Path) -> None:
    """The ledgers say which one: the lines of the others may be gone."""
    node = small_chain(tmp_path)
    node.file(2, "ndjson.zst").write_bytes(b"")
    assert proof.verify(proofs_of(node, Place(RUN, 5, 4))[0], trusted(node)).chunk == 3


def test_numbers_that_came_late_are_found(tmp_path: Path) -> None:
    """A uprobe lane settles by count: its number 2 came a chunk later, its number 3 a chunk early."""
    late = {2: 3, 3: 2}

    class Uprobes(Source):
        @staticmethod
        def line(node: str, lane: int, seq: int, run: str = "", boot: str = "") -> bytes:
            return line(node, lane, late.get(seq, seq), run, boot)

    node = Node(tmp_path)
    store, source = node.open(), Uprobes("node-a")
    for _ in range(2):
        store.commit(*one(source.batch({3: 3})))
        store.close("size")
    store.release()
    assert node.verify().valid
    places = [Place(RUN, 3, seq) for seq in range(6)]
    assert [2, 2, 3, 2, 3, 3] == [msgspec.json.decode(data)["chunk"] for data in proofs_of(node, *places)]
    with pytest.raises(NotFound, match="filtered or lost"):
        proofs_of(node, Place(RUN, 3, 6))


def test_what_is_not_signed_yet_is_said_so(tmp_path: Path) -> None:
    """Open, and closed without a signature: try again."""
    node = small_chain(tmp_path)
    store = node.open()
    store.commit(*one(Source(node.name, "f" * 16).batch({0: 2})))
    for at in (LineOf(5, 1), Place("f" * 16, 0, 1)):
        with pytest.raises(TryAgain) as caught:
            proofs_of(node, at)
        assert caught.value.hint
    store.release()
    # A number of an ended run is in no open chunk.
    with pytest.raises(NotFound):
        proofs_of(node, Place(RUN, 0, 999))
    node.file(3, "dsse.json").unlink()
    for at in (LineOf(3, 1), Place(RUN, 5, 4)):
        with pytest.raises(TryAgain, match="not signed yet"):
            proofs_of(node, at)


@pytest.mark.parametrize(
    "at",
    [LineOf(2, 0), LineOf(2, 8), LineOf(1, 1), LineOf(77, 1), Place(RUN, 0, 6), Place(RUN, 0, 99), Place("x", 0, 0)],
)
def test_what_is_not_there_is_not_found(tmp_path: Path, at: Place | LineOf) -> None:
    """No such chunk, line, run or number; and a number that was filtered or lost."""
    with pytest.raises(NotFound):
        proofs_of(small_chain(tmp_path), at)


def test_only_a_directory_with_a_chain_is_evidence(tmp_path: Path) -> None:
    """Anything else is named."""
    (tmp_path / "file").touch()
    for path, kind in ((tmp_path / "none", NotFound), (tmp_path, NotFound), (tmp_path / "file", UsageError)):
        with pytest.raises(kind):
            Prover(path)


def _edited(node: Node) -> None:
    path = node.file(2, "ndjson.zst")
    path.write_bytes(path.read_bytes().replace(b'"comm":"sh"', b'"comm":"su"', 1))


def _swapped(node: Node) -> None:
    path = node.file(2, "ndjson.zst")
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


def _other_ledger(node: Node) -> None:
    path = node.file(2, "ledger.json")
    path.write_bytes(path.read_bytes().replace(b'"close_reason":"size"', b'"close_reason":"stop"'))


def _broken_ledger(node: Node) -> None:
    node.file(2, "ledger.json").write_bytes(b"{")


def _no_key(node: Node) -> None:
    shutil.rmtree(node.evidence / "keys")


def _other_signature(node: Node) -> None:
    path = node.file(2, "dsse.json")
    opened = dsse.open_envelope(node.file(3, "dsse.json").read_bytes())
    path.write_bytes(dsse.seal(dsse.open_envelope(path.read_bytes()).payload, opened.key_id, opened.signature))


def _odd_key_name(node: Node) -> None:
    path = node.file(2, "dsse.json")
    opened = dsse.open_envelope(path.read_bytes())
    path.write_bytes(dsse.seal(opened.payload, "../../state/keys/trusted", opened.signature))


def _moved(node: Node) -> None:
    shutil.copy(node.file(3, "dsse.json"), node.file(2, "dsse.json"))


def _wrong_root(node: Node) -> None:
    for index in (3, 4):
        for kind in ("ndjson.zst", "ledger.json", "dsse.json"):
            node.file(index, kind).unlink()
    resign(node, 2, merkle_root="0" * 64)


@pytest.mark.parametrize(
    "damage",
    [_edited, _swapped, _other_ledger, _broken_ledger, _no_key, _other_signature, _odd_key_name, _moved, _wrong_root],
)
def test_nothing_is_proved_from_damaged_evidence(tmp_path: Path, damage: object) -> None:
    """The chunk must be what its statement says, under a signature that fits."""
    node = small_chain(tmp_path)
    damage(node)  # type: ignore[operator]
    for at in (LineOf(2, 1), Place(RUN, 0, 0)):
        with pytest.raises(BadAnswer) as caught:
            proofs_of(node, at)
        assert caught.value.runbook


def test_a_line_with_another_text_is_not_proved(tmp_path: Path) -> None:
    """The place alone is not enough when the line was given."""
    node = small_chain(tmp_path)
    text = line(node.name, 0, 1)[:-1].replace(b'"sh"', b'"su"')
    with pytest.raises(BadAnswer, match="another text"):
        Prover(node.evidence).prove([Wanted(place_of(text), text)])


# -- checking ------------------------------------------------------------------------------------------


@cache
def sample() -> tuple[bytes, Trust]:
    """Return a proof and the keys to trust, made once."""
    folder = Path(mkdtemp(prefix="stella-proof-"))
    node = small_chain(folder)
    [data] = proofs_of(node, LineOf(2, 6))
    shutil.rmtree(folder)
    return data, trusted(node)


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_every_change_of_a_byte_is_refused(data: st.DataObject) -> None:
    """Flipped, taken out or put in: no proof any more."""
    good, known = sample()
    assert proof.verify(good, known)
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 1]))
    bad = good[:at] + (bytes([byte]) if byte < 250 or not cut else b"") + good[at + cut :]
    if bad != good:
        with pytest.raises(ValueError, match=r"."):
            proof.verify(bad, known)


def changed(**members: object) -> bytes:
    return canonical.dumps(json.loads(sample()[0]) | members)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"format": "stella-signals-proof/2"}, "format"),
        ({"more": 1}, "unknown field"),
        ({"chain_id": "0" * 32}, "the statement is of chunk 2"),
        ({"chunk": 3}, "the statement is of chunk 2"),
        ({"leaf_index": 5 + 2**32}, "no leaf"),
        ({"leaf_index": -1}, "no leaf"),
        ({"leaf_index": 4}, "."),
        ({"tree_size": 8}, "the chunk has 7 lines"),
        ({"path": []}, "fewer"),
        ({"path": ["0" * 64] * 3}, "another Merkle root|more|fewer"),
        ({"path": ["0" * 64] * 64}, "at most 63"),
        ({"path": ["A" * 64]}, "in hex"),
        ({"line": "[]"}, "no canonical JSON object"),
        ({"line": "nonsense"}, "no JSON"),
        ({"line": line("node-a", 0, 0).decode()}, "no canonical"),
        ({"line": line("node-a", 0, 0)[:-1].decode()}, "another Merkle root"),
        ({"line": line("node-b", 0, 0)[:-1].decode()}, "another node"),
        ({"public_key": ""}, "no public key"),
        ({"public_key": None}, "either a public key or a certificate"),
        ({"certificate": "nonsense"}, "either a public key or a certificate"),
        ({"certificate": "nonsense", "public_key": None}, "."),
        ({"stamps": "{}"}, "bundle or timestamps"),
        ({"bundle": "{}"}, "bundle or timestamps"),
        ({"bundle": "x" * (2 << 20)}, "over"),
        ({"envelope": "{}"}, "."),
    ],
)
def test_a_proof_that_says_something_else_is_refused(members: dict[str, object], said: str) -> None:
    """Each member is held against what was signed, in a file that is canonical all the same."""
    with pytest.raises(ValueError, match=said):
        proof.verify(changed(**members), sample()[1])


def test_trust_comes_from_outside(tmp_path: Path) -> None:
    """The key in the proof counts only when its id is trusted, and while it is."""
    data, known = sample()
    [identity] = known.keys
    for others, said in (({}, "no trusted key"), ({"0" * 64: ""}, "not trusted"), ({identity: "2000"}, "retired")):
        with pytest.raises(ValueError, match=said):
            proof.verify(data, Trust(others))
    other = keys.public_pem(Node(tmp_path).key._key.public_key()).decode()
    with pytest.raises(ValueError, match="is not here"):
        proof.verify(changed(public_key=other), known)


def test_a_forged_signature_is_refused(tmp_path: Path) -> None:
    """Everything else in it may be as it should."""
    data, known = sample()
    document: Proof = proof.decode(data)
    opened = dsse.open_envelope(document.envelope.encode())
    signature = Node(tmp_path).key.envelope(opened.payload)
    forged = dsse.seal(opened.payload, opened.key_id, dsse.open_envelope(signature).signature)
    with pytest.raises(ValueError, match="signature does not fit"):
        proof.verify(changed(envelope=forged.decode()), known)


def test_the_path_of_a_proof_is_short(tmp_path: Path) -> None:
    """As long as the logarithm of the chunk's lines."""
    node = Node(tmp_path)
    store = node.open()
    store.commit(*one(Source(node.name).batch({0: 1000})))
    store.close("size")
    store.release()
    [data] = proofs_of(node, Place(RUN, 0, 321))
    assert (10, 321) == (len(proof.decode(data).path), proof.decode(data).leaf_index)


# -- the commands --------------------------------------------------------------------------------------


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def stella(*words: str) -> int:
    return commands.run(["signals", *words])


def test_the_commands_write_and_check(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to stdout or a file, several into files; checked with a fingerprint, as text and as JSON."""
    monkeypatch.chdir(tmp_path)
    node = small_chain(tmp_path)
    evidence, key = ["--evidence", str(node.evidence)], ["--key", f"sha256:{node.made.key_id}"]
    assert 0 == stella("prove", f"{RUN}/0/1", *evidence)
    printed = capfdbinary.readouterr().out
    assert 0 == stella("prove", "2:2", *evidence, "--output", "one.json")
    assert printed == Path("one.json").read_bytes()
    assert 0 == stella("verify-proof", "one.json", *key)
    assert b"Proof Status: \xe2\x9c\x93 VALID\n  File: one.json\n" in capfdbinary.readouterr().out
    assert 0 == stella("prove", "2:1", f"{RUN}/5/3", *evidence, "--output-directory", "many")
    names = ["many/proof-000002-1.json", "many/proof-000003-2.json"]
    assert names == capfdbinary.readouterr().out.decode().split()
    assert 0 == stella("verify-proof", *names, *key, "--format", "json")
    answer = json.loads(capfdbinary.readouterr().out)
    assert [True, [2, 3], [node.made.key_id]] == [
        answer["valid"], [p["proven"]["chunk"] for p in answer["proofs"]], answer["trusted_keys"]
    ]  # fmt: skip
    # Lines as `tail` prints them, and a proof from a pipe; trust is the node's own.
    monkeypatch.setattr(sys, "stdin", _Stdin(line(node.name, 5, 3) + b"\n" + line(node.name, 5, 4)))
    assert 0 == stella("prove", "-", *evidence)
    assert ["proof-000003-2.json", "proof-000003-3.json"] == capfdbinary.readouterr().out.decode().split()
    monkeypatch.setattr(sys, "stdin", _Stdin(printed))
    assert 0 == stella("verify-proof", "-", "--target", str(node.evidence))


def test_the_commands_say_no(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes 1, 2 and 4, and the reason."""
    monkeypatch.chdir(tmp_path)
    node = small_chain(tmp_path)
    evidence, key = ["--evidence", str(node.evidence)], ["--key", f"sha256:{node.made.key_id}"]
    assert 4 == stella("prove", "2:99", *evidence)
    assert 2 == stella("prove", "whatever", *evidence)
    assert 2 == stella("prove", "2:1", "2:2", *evidence, "--output", "x")
    assert 2 == stella("prove", "2:1", *evidence, "--output", "x", "--output-directory", "y")
    assert 4 == stella("prove", "2:1", *evidence, "--output", "nowhere/x")
    for text in (b"", b"no line\n"):
        monkeypatch.setattr(sys, "stdin", _Stdin(text))
        assert 2 == stella("prove", "-", *evidence)
    assert 4 == stella("verify-proof", "nowhere.json", *key)
    Path("bad.json").write_bytes(changed(chunk=3))
    capfdbinary.readouterr()
    assert 1 == stella("verify-proof", "bad.json", "--key", f"sha256:{next(iter(sample()[1].keys))}")
    assert b"INVALID\n  File: bad.json\n  Error: the statement is of chunk 2" in capfdbinary.readouterr().out
    assert 1 == stella("verify-proof", "bad.json", "--target", str(tmp_path / "elsewhere" / "evidence"))
    assert b"Hint: name the key you trust" in capfdbinary.readouterr().out


@pytest.mark.anyio
async def test_a_proof_shows_the_log_and_the_time(tmp_path: Path) -> None:
    """A logged chunk's proof holds its bundle: with the trusted root it says where and when.

    A bundle of another chunk is refused either way.
    """
    with surroundings(2) as around:
        queue = Queue(tmp_path, around)
        await queue.round(parallel=1)
        root = around.services().root
    [data] = proofs_of(queue.node, LineOf(2, 3))
    keys_only = trusted(queue.node)
    proven = proof.verify(data, Trust(keys_only.keys, root=root))
    assert (proven.log, proven.log_index) == (around.log.host, 1) and proven.trusted_time
    blind = proof.verify(data, keys_only)
    assert blind.unjudged and not blind.log and not blind.trusted_time
    other = json.loads(data) | {"bundle": queue.bundle(3).decode()}
    for trust in (keys_only, Trust(keys_only.keys, root=root)):
        with pytest.raises(ValueError, match="another envelope"):
            proof.verify(canonical.dumps(other), trust)
