"""The log's stand-in: its trees against known vectors, and its ways in one suite with a real log, where there is one.

`REKOR_V1_URL` names a real one; so do `REKOR_V2_URL` and `REKOR_V2_READ_URL`, the prefix of its checkpoint and tiles.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from tests.evidence.rfc6962 import LEAVES, ROOTS
from tests.sigstore import bundles, merkle_tree
from tests.sigstore.log_entries import encode
from tests.sigstore.log_standin import LogStandin
from tests.sigstore.merkle_tree import Tree, leaf_hash
from tests.sigstore.proofs import (
    ProofError,
    check_consistency,
    path_from_tiles,
    read_checkpoint,
    root_of_inclusion,
    tile_path,
)

# Of the same tree, as the first Certificate Transparency log gives them.
INCLUSION = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree_of(n: int) -> Tree:
    """Return a tree of `n` leaves that differ."""
    tree = Tree()
    for i in range(n):
        tree.append(leaf_hash(i.to_bytes(4, "big")))
    return tree


def test_the_tree_gives_the_known_roots_and_proofs() -> None:
    """Every root, audit path and consistency proof of the reference vectors."""
    tree = Tree()
    for leaf in LEAVES:
        tree.append(leaf_hash(leaf))
    assert ROOTS == [tree.root(size).hex() for size in range(9)]
    for (index, size), path in INCLUSION.items():
        assert path == [one.hex() for one in tree.inclusion(index, size)]
    for (first, second), path in CONSISTENCY.items():
        assert path == [one.hex() for one in tree.consistency(first, second)]


def test_every_proof_of_a_tree_holds_and_no_other() -> None:
    """For all pairs of sizes: the proofs check out, and one with a changed, missing or extra hash does not."""
    tree = tree_of(40)
    for size in range(1, 41):
        for index in range(size):
            path = tree.inclusion(index, size)
            assert tree.root(size) == root_of_inclusion(tree.leaf(index), index, size, path)
        for first in range(1, size + 1):
            path = tree.consistency(first, size)
            check_consistency(first, tree.root(first), size, tree.root(size), path)
            for wrong in ([*path, bytes(32)], path[:-1], [bytes(32), *path[1:]]):
                if wrong != path and (path or len(wrong) == 1):
                    with pytest.raises(ProofError):
                        check_consistency(first, tree.root(first), size, tree.root(size), wrong)


def test_a_proof_of_a_big_tree_costs_some_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty thousand leaves: not a walk over them, and a leaf more costs no more than its way to the root."""
    hashed = 0

    def counting(left: bytes, right: bytes) -> bytes:
        nonlocal hashed
        hashed += 1
        return hashlib.sha256(b"\1" + left + right).digest()

    monkeypatch.setattr(merkle_tree, "node_hash", counting)
    tree = tree_of(20_000)
    assert hashed < 20_000
    for index in range(0, 20_000, 500):
        hashed = 0
        assert len(tree.inclusion(index, 20_000)) <= 15
        assert hashed <= 2 * 15
    hashed = 0
    tree.consistency(9_999, 20_000)
    assert hashed <= 2 * 15


def test_tiles_hold_what_the_tree_holds_across_their_edges() -> None:
    """Sizes around 256 and 65536 nodes of a level: an audit path from tiles is the one from the tree."""
    tree = tree_of(66_000)

    def read(path: str, size: int) -> bytes:
        level, _, rest = path.removeprefix("/tile/").partition("/")
        number, _, width = rest.partition(".p/")
        found = tree.tile(int(level), int(number.replace("x", "").replace("/", "")), int(width or 256), size)
        assert found is not None, path
        return found

    for size in (1, 255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537, 66_000):
        for index in {0, size // 2, size - 1}:
            assert tree.inclusion(index, size) == path_from_tiles(lambda path: read(path, size), index, size)  # noqa: B023
    assert tree.tile(0, 1, 256, 511) is None
    assert tree.tile(3, 0, 1, 66_000) is None


@dataclass(frozen=True)
class Log:
    """Where a log is, and its stand-in, when it is one."""

    url: str
    read_url: str
    standin: LogStandin | None = None


def rows(*names: str) -> list[str]:
    """Return the logs to run against: the stand-in, and the real one when all of `names` are set."""
    return ["stand-in", "real"] if all(os.environ.get(name) for name in names) else ["stand-in"]


@pytest.fixture(params=rows("REKOR_V1_URL"))
def log_v1(request: pytest.FixtureRequest) -> Iterator[Log]:
    """A Rekor v1."""
    if request.param == "real":
        yield Log(os.environ["REKOR_V1_URL"], "")
        return
    with LogStandin(first_index_v1=1000) as standin:
        yield Log(standin.url, "", standin)


@pytest.fixture(params=[*rows("REKOR_V2_URL", "REKOR_V2_READ_URL"), "stand-in, reads apart"])
def log_v2(request: pytest.FixtureRequest) -> Iterator[Log]:
    """A Rekor v2."""
    if request.param == "real":
        yield Log(os.environ["REKOR_V2_URL"], os.environ["REKOR_V2_READ_URL"])
        return
    with LogStandin(separate_reads="apart" in request.param) as standin:
        yield Log(standin.url, standin.read_url, standin)


def post(url: str, document: Any) -> httpx.Response:
    """Submit; Rekor v2 may take its time."""
    return httpx.post(url, json=document, timeout=30)


def proven(entry: dict[str, Any]) -> int:
    """Check that an entry's proof leads to the root in its checkpoint; return the size of that tree."""
    proof = entry["inclusionProof"]
    leaf = leaf_hash(base64.b64decode(entry["canonicalizedBody"]))
    path = [base64.b64decode(one) for one in proof["hashes"]]
    root = root_of_inclusion(leaf, int(proof["logIndex"]), int(proof["treeSize"]), path)
    checkpoint = read_checkpoint(proof["checkpoint"]["envelope"])
    assert (checkpoint.size, checkpoint.root) == (int(proof["treeSize"]), root)
    assert encode(root) == proof["rootHash"]
    assert any(base64.b64decode(entry["logId"]["keyId"])[:4] == key_id for _, key_id, _ in checkpoint.signatures)
    return checkpoint.size


def random_statement() -> bytes:
    """Return a statement that no log has seen."""
    return bundles.statement(content=os.urandom(16))


def test_v1_answers_with_proof_promise_and_checkpoint_that_its_key_signed(log_v1: Log) -> None:
    """A new `dsse` entry: 201 and Location, a proof that holds, and signatures by the key at `publicKey`."""
    signer = bundles.managed()
    reply = post(
        log_v1.url + "/api/v1/log/entries", bundles.proposal_v1(signer, bundles.envelope(signer, random_statement()))
    )
    assert 201 == reply.status_code, reply.text
    ((uuid, entry),) = reply.json().items()
    assert reply.headers["Location"].endswith(uuid)
    proven(bundles.entry_from_v1(reply.json()))
    pem = httpx.get(log_v1.url + "/api/v1/log/publicKey").content
    key = load_pem_public_key(pem)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert hashlib.sha256(spki).hexdigest() == entry["logID"]
    promised = {name: entry[name] for name in ("body", "integratedTime", "logID", "logIndex")}
    promise = base64.b64decode(entry["verification"]["signedEntryTimestamp"])
    key.verify(promise, rfc8785.dumps(promised), ec.ECDSA(hashes.SHA256()))
    checkpoint = read_checkpoint(entry["verification"]["inclusionProof"]["checkpoint"])
    ours = [signature for _, key_id, signature in checkpoint.signatures if key_id == hashlib.sha256(spki).digest()[:4]]
    key.verify(ours[0], checkpoint.text, ec.ECDSA(hashes.SHA256()))


def test_v1_says_where_an_entry_is_that_it_has_already(log_v1: Log) -> None:
    """The same proposal again is 409 with the Location of the first; both ways of reading give the same entry."""
    signer = bundles.managed()
    proposal = bundles.proposal_v1(signer, bundles.envelope(signer, random_statement()))
    first = post(log_v1.url + "/api/v1/log/entries", proposal)
    again = post(log_v1.url + "/api/v1/log/entries", proposal)
    assert (201, 409) == (first.status_code, again.status_code)
    ((uuid, entry),) = first.json().items()
    assert uuid[-64:] == again.headers["Location"].rpartition("/")[2][-64:]
    by_uuid = httpx.get(f"{log_v1.url}/api/v1/log/entries/{again.headers['Location'].rpartition('/')[2]}")
    by_index = httpx.get(f"{log_v1.url}/api/v1/log/entries", params={"logIndex": entry["logIndex"]})
    for found in (by_uuid, by_index):
        ((found_uuid, found_entry),) = found.json().items()
        assert (uuid, entry["body"], entry["integratedTime"]) == (
            found_uuid,
            found_entry["body"],
            found_entry["integratedTime"],
        )
        proven(bundles.entry_from_v1(found.json()))


def test_v1_proves_that_it_only_grew(log_v1: Log) -> None:
    """A consistency proof leads from an older checkpoint to a newer one."""
    signer = bundles.managed()
    checkpoints = []
    for _ in range(3):
        entry = bundles.logged(log_v1.url, 1, signer, bundles.envelope(signer, random_statement()))
        checkpoints.append(read_checkpoint(entry["inclusionProof"]["checkpoint"]["envelope"]))
    first, last = checkpoints[0], checkpoints[-1]
    sizes = {"firstSize": first.size, "lastSize": last.size}
    proof = httpx.get(log_v1.url + "/api/v1/log/proof", params=sizes).json()
    path = [bytes.fromhex(one) for one in proof["hashes"]]
    check_consistency(first.size, first.root, last.size, last.root, path)
    backwards = httpx.get(log_v1.url + "/api/v1/log/proof", params={"firstSize": 3, "lastSize": 2})
    beyond = httpx.get(log_v1.url + "/api/v1/log/proof", params={"firstSize": 1, "lastSize": 10**12})
    assert (400, 400) == (backwards.status_code, beyond.status_code)
    state = httpx.get(log_v1.url + "/api/v1/log").json()
    assert state["treeSize"] >= last.size
    assert state["rootHash"] == read_checkpoint(state["signedTreeHead"]).root.hex()


def test_v1_refuses_what_does_not_verify(log_v1: Log) -> None:
    """A signature by another key, and a kind that there is not, are 400; an entry that is not there is 404."""
    signer = bundles.managed()
    sealed = bundles.envelope(bundles.managed(), random_statement())
    forged = post(log_v1.url + "/api/v1/log/entries", bundles.proposal_v1(signer, sealed))
    unknown = post(log_v1.url + "/api/v1/log/entries", {"apiVersion": "9.9.9", "kind": "dsse", "spec": {}})
    assert 400 == forged.status_code
    assert unknown.status_code in (400, 422)
    assert 404 == httpx.get(f"{log_v1.url}/api/v1/log/entries/{'00' * 32}").status_code


def test_v1_takes_a_hashedrekord(log_v1: Log) -> None:
    """A signed digest is logged as it came."""
    signer = bundles.managed()
    data = os.urandom(16)
    content = {
        "content": encode(signer.key.sign(data, ec.ECDSA(hashes.SHA256()))),
        "publicKey": {"content": encode(signer.pem)},
    }
    spec = {"data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}}, "signature": content}
    reply = post(log_v1.url + "/api/v1/log/entries", {"apiVersion": "0.0.1", "kind": "hashedrekord", "spec": spec})
    assert 201 == reply.status_code, reply.text
    entry = bundles.entry_from_v1(reply.json())
    proven(entry)
    assert spec["data"] == json.loads(base64.b64decode(entry["canonicalizedBody"]))["spec"]["data"]


def test_v2_answers_with_an_entry_that_a_checkpoint_holds(log_v2: Log) -> None:
    """A new entry: 201 and a TransparencyLogEntry without promise and time, whose proof holds."""
    signer = bundles.managed()
    sealed = bundles.envelope(signer, random_statement())
    reply = post(log_v2.url + "/api/v2/log/entries", bundles.request_v2(signer, sealed))
    assert 201 == reply.status_code, reply.text
    entry = reply.json()
    assert ({"kind": "hashedrekord", "version": "0.0.2"}, "0") == (entry["kindVersion"], entry["integratedTime"])
    assert isinstance(entry["inclusionProof"]["hashes"], list)
    proven(entry)
    body = json.loads(base64.b64decode(entry["canonicalizedBody"]))
    assert encode(signer.spki) == body["spec"]["hashedRekordV002"]["signature"]["verifier"]["publicKey"]["rawBytes"]


def test_v2_gives_no_more_than_the_index_of_an_entry_that_it_has_already(log_v2: Log) -> None:
    """The same again is 409 and `x-log-index`; its proof comes out of the checkpoint and the tiles."""
    signer = bundles.managed()
    request = bundles.request_v2(signer, bundles.envelope(signer, random_statement()))
    first = post(log_v2.url + "/api/v2/log/entries", request)
    again = post(log_v2.url + "/api/v2/log/entries", request)
    assert (201, 409) == (first.status_code, again.status_code)
    assert "inclusionProof" not in again.text
    index = int(again.headers["x-log-index"])
    entry = first.json()
    assert int(entry["logIndex"]) == index
    checkpoint = read_checkpoint(httpx.get(log_v2.read_url + "/checkpoint").content.decode())

    def read(path: str) -> bytes:
        return httpx.get(log_v2.read_url + path).raise_for_status().content

    body = base64.b64decode(entry["canonicalizedBody"])
    path = path_from_tiles(read, index, checkpoint.size)
    assert checkpoint.root == root_of_inclusion(leaf_hash(body), index, checkpoint.size, path)
    width = min(256, checkpoint.size - index // 256 * 256)
    bundled = read(tile_path("entries", index // 256, width))
    bodies = []
    while bundled:
        length = int.from_bytes(bundled[:2], "big")
        bodies.append(bundled[2 : 2 + length])
        bundled = bundled[2 + length :]
    assert (width, body) == (len(bodies), bodies[index % 256])
    assert 404 == httpx.get(log_v2.read_url + tile_path(0, checkpoint.size // 256 + 1)).status_code


def test_v2_refuses_what_it_does_not_take(log_v2: Log) -> None:
    """A signature by another key, a key that is not what it is said to be, and another type are 400."""
    signer, other = bundles.managed(), bundles.managed()
    sealed = bundles.envelope(signer, random_statement())
    mislabelled = bundles.request_v2(signer, sealed)
    mislabelled["hashedRekordRequestV002"]["signature"]["verifier"]["keyDetails"] = "PKIX_ECDSA_P384_SHA_384"
    for request in (bundles.request_v2(other, sealed), mislabelled, {"noSuchRequestV002": {}}):
        reply = post(log_v2.url + "/api/v2/log/entries", request)
        assert (400, 3) == (reply.status_code, reply.json()["code"])


def test_v2_entries_of_one_moment_share_a_checkpoint() -> None:
    """Submissions wait for the next checkpoint; those that wait together get the same."""
    signer = bundles.managed()
    sealed = [bundles.envelope(signer, random_statement()) for _ in range(8)]
    with LogStandin(checkpoint_seconds=600) as log, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(bundles.logged, log.url, 2, signer, one) for one in sealed]
        while log.v2.tree.size < 8:
            time.sleep(0.01)
        assert not any(one.done() for one in waiting)
        log.v2.publish()
        entries = [one.result() for one in waiting]
    assert {8} == {proven(entry) for entry in entries}


def test_the_checkpoints_of_v2_are_signed_notes() -> None:
    """Ed25519 over the text; the key id is the first four bytes of the log's id; witnesses' lines stand behind."""
    with LogStandin() as log:
        log.witness_lines = [f"— witness.test/w1 {encode(os.urandom(76))}"]
        log.grow(3)
        checkpoint = read_checkpoint(httpx.get(log.read_url + "/checkpoint").content.decode())
        (name, key_id, signature), (witness, _, _) = checkpoint.signatures
        log.v2_key.public_key().verify(signature, checkpoint.text)
        with pytest.raises(InvalidSignature):
            log.v2_key.public_key().verify(signature, checkpoint.text + b"x")
        raw = log.v2_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        log_id = hashlib.sha256(log.host.encode() + b"\n\x01" + raw).digest()
        assert (log.host, log.host, log_id[:4]) == (checkpoint.origin, name, key_id)
        assert encode(log_id) == log.trusted_root_tlogs(2)[0]["logId"]["keyId"]
        assert ("witness.test/w1", 3) == (witness, checkpoint.size)
