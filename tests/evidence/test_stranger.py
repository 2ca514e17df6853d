"""A verifier written from docs/evidence-format.md alone: it imports nothing of ours, and agrees."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import tarfile
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from chain_maker import small_chain
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from export_maker import JANUARY, export_to, months

from stella_shared.evidence.proof import encode
from stella_shared.evidence.prover import LineOf, Prover, Wanted
from stella_shared.evidence.report import FAULT_CODES

DOC = Path(__file__).parents[2] / "docs" / "evidence-format.md"


def unzstd(data: bytes) -> bytes:
    """Return what Debian's `zstd` makes of frames."""
    if not data:  # no lines, no frame
        return b""
    return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=True).stdout


def root(leaves: list[bytes]) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else sha256().digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\1" + root(leaves[:k]) + root(leaves[k:])).digest()


def stranger(evidence: Path, trusted: str) -> dict[str, int]:
    """Verify a chain; return the sums of its accounting."""
    manifest = (evidence / "chain.json").read_bytes()
    chain = json.loads(manifest)
    key = load_pem_public_key((evidence / "keys" / f"{trusted}.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert trusted == sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    previous: dict[str, Any] | None = None
    previous_ledger, live = "", {}
    sums: dict[str, int] = defaultdict(int)
    for index in range(1, 1 + len(list(evidence.glob("*.dsse.json")))):
        name = f"{index:06d}"
        envelope = json.loads((evidence / f"{name}.dsse.json").read_bytes())
        payload = base64.b64decode(envelope["payload"])
        kind = envelope["payloadType"].encode()
        signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
        assert envelope["signatures"][0]["keyid"] == trusted
        key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed, ec.ECDSA(hashes.SHA256()))
        statement = json.loads(payload)
        predicate = statement["predicate"]
        data = (evidence / f"{name}.ndjson.zst").read_bytes()
        ledger_bytes = (evidence / f"{name}.ledger.json").read_bytes()
        ledger = json.loads(ledger_bytes)
        lines = unzstd(data).split(b"\n")[:-1]
        assert statement["subject"] == [{"name": f"{name}.ndjson.zst", "digest": {"sha256": sha256(data).hexdigest()}}]
        assert predicate["chain"] == {
            "id": chain["chain_id"],
            "index": index,
            "previous": previous,
            "manifest_sha256": sha256(manifest).hexdigest(),
            "predecessor": chain["predecessor"],
        }
        merkle_root = root([sha256(b"\0" + line).digest() for line in lines]).hex()
        assert predicate["events"] == {"count": len(lines), "bytes": len(unzstd(data)), "merkle_root": merkle_root}
        assert predicate["accounting"]["ledger_sha256"] == sha256(ledger_bytes).hexdigest()
        assert ledger["previous_ledger_sha256"] == previous_ledger
        rows = [(run, *row) for run in ledger["runs"] for row in run["lanes"]]
        unnumbered = sum(n for cause, n in ledger["filtered"].items() if cause.startswith("kernel_"))
        unnumbered += ledger["lost"].get("probe_missed", 0)
        produced = sum(row[3] - row[2] for row in rows) + unnumbered
        assert produced == predicate["accounting"]["produced"]
        assert produced == len(lines) + sum(ledger["filtered"].values()) + sum(ledger["lost"].values())
        numbers = defaultdict(set)
        for line in lines:
            event = json.loads(line)
            numbers[event["run"], event["lane"]].add(event["seq"])
        for run, lane, first, after, recorded, filtered, lost in rows:
            assert after - first == recorded + filtered + lost
            assert live.get((run["run"], lane), 0) == first
            here = numbers.pop((run["run"], lane), set())
            assert len(here) == recorded
            assert all(first <= seq < after for seq in here)
            live[run["run"], lane] = after
        assert not numbers
        previous = {
            "index": index,
            "chunk_sha256": sha256(data).hexdigest(),
            "statement_sha256": sha256(payload).hexdigest(),
        }
        previous_ledger = sha256(ledger_bytes).hexdigest()
        for word in ("produced", "recorded", "filtered", "lost"):
            sums[word] += predicate["accounting"][word]
    return sums


def test_a_stranger_agrees(tmp_path: Path) -> None:
    """From the page alone: the same verdict, the same sums."""
    node = small_chain(tmp_path)
    totals = node.verify().totals
    expected = {w: getattr(totals, w) for w in ("produced", "recorded", "filtered", "lost")}
    assert expected == stranger(node.evidence, node.made.key_id)


def strange_proof(document: bytes, trusted: str) -> tuple[str, int, str]:
    """Check a proof by section 13; return (chain, chunk, line)."""
    proof = json.loads(document)
    envelope = json.loads(proof["envelope"])
    [signature] = envelope["signatures"]
    key = load_pem_public_key(proof["public_key"].encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert trusted == signature["keyid"] == sha256(der).hexdigest()
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    key.verify(base64.b64decode(signature["sig"]), signed, ec.ECDSA(hashes.SHA256()))
    predicate = json.loads(payload)["predicate"]
    assert (proof["chain_id"], proof["chunk"]) == (predicate["chain"]["id"], predicate["chain"]["index"])
    assert proof["tree_size"] == predicate["events"]["count"]
    here, last = proof["leaf_index"], proof["tree_size"] - 1
    assert 0 <= here <= last
    root = sha256(b"\0" + proof["line"].encode()).digest()
    for beside in map(bytes.fromhex, proof["path"]):
        assert last
        if here % 2 or here == last:
            root = sha256(b"\1" + beside + root).digest()
            while here % 2 == 0 and here:
                here, last = here // 2, last // 2
        else:
            root = sha256(b"\1" + root + beside).digest()
        here, last = here // 2, last // 2
    assert last == 0
    assert root.hex() == predicate["events"]["merkle_root"]
    assert json.loads(proof["line"])["node"] == predicate["host"]["node"]
    return proof["chain_id"], proof["chunk"], proof["line"]


def test_a_stranger_accepts_our_proofs(tmp_path: Path) -> None:
    """Section 13 is enough to check one."""
    node = small_chain(tmp_path)
    for number, line in enumerate(unzstd(node.file(2, "ndjson.zst").read_bytes()).decode().splitlines(), 1):
        [proof] = Prover(node.evidence).prove([Wanted(LineOf(2, number))])
        assert (node.made.chain_id, 2, line) == strange_proof(encode(proof), node.made.key_id)


def test_the_page_names_every_fault() -> None:
    """The table of faults is the code's."""
    table = DOC.read_text().split("| fault | meaning |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE))
    assert FAULT_CODES == rows


def opened(path: Path, key: ec.EllipticCurvePublicKey, trusted: str) -> tuple[dict[str, Any], str]:
    """Return a signed statement and its SHA-256."""
    envelope = json.loads(path.read_bytes())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    assert envelope["signatures"][0]["keyid"] == trusted
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed, ec.ECDSA(hashes.SHA256()))
    return json.loads(payload), sha256(payload).hexdigest()


def stranger_to_an_export(evidence: Path, trusted: str) -> tuple[int, int]:
    """Verify the manifest, the anchor and the links of an export; return its range."""
    key = load_pem_public_key((evidence / "keys" / f"{trusted}.pem").read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    manifest, _ = opened(evidence / "manifest.dsse.json", key, trusted)
    predicate = manifest["predicate"]
    assert "https://stella-signals.dev/evidence-export/v1" == manifest["predicateType"]
    assert json.loads((evidence / "chain.json").read_bytes())["chain_id"] == predicate["chain_id"]
    listed = {subject["name"]: subject["digest"]["sha256"] for subject in manifest["subject"]}
    here = {str(p.relative_to(evidence)): p for p in evidence.rglob("*") if p.is_file()}
    del here["manifest.dsse.json"]
    assert list(listed) == sorted(here)
    assert listed == {name: sha256(path.read_bytes()).hexdigest() for name, path in here.items()}
    anchor = predicate["anchor"]
    before, previous = opened(evidence / f"{anchor['index']:06d}.dsse.json", key, trusted)
    assert (anchor["statement_sha256"], anchor["ledger_sha256"]) == (
        previous, before["predicate"]["accounting"]["ledger_sha256"]
    )  # fmt: skip
    previous_ledger = anchor["ledger_sha256"]
    for index in range(predicate["first"], predicate["last"] + 1):
        statement, digest = opened(evidence / f"{index:06d}.dsse.json", key, trusted)
        assert statement["predicate"]["chain"]["previous"]["statement_sha256"] == previous
        assert statement["subject"][0]["digest"]["sha256"] == listed[f"{index:06d}.ndjson.zst"]
        assert json.loads((evidence / f"{index:06d}.ledger.json").read_bytes())["previous_ledger_sha256"] == (
            previous_ledger
        )
        previous, previous_ledger = digest, listed[f"{index:06d}.ledger.json"]
    return predicate["first"], predicate["last"]


def test_a_stranger_can_check_an_export(tmp_path: Path) -> None:
    """From section 12 of the page alone."""
    node = months(tmp_path / "node")
    with tarfile.open(export_to(node, tmp_path / "january.tar.gz", JANUARY)) as tar:
        tar.extractall(tmp_path, filter="data")
    assert (3, 5) == stranger_to_an_export(tmp_path / "evidence", node.made.key_id)
