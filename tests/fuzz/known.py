"""What the fuzzers begin with and compare with: three chains that are logged, written to a folder once.

FOLDER/known/{v1,v2,keyless}/    evidence, head.json, keys.json (trusted key ids), root.json
FOLDER/corpus/NAME/              seeds for `fuzz_NAME`
"""

from __future__ import annotations

import json
import shutil
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio

from stella_shared.evidence import canonical, dsse, keys, names
from stella_shared.evidence.stamps import decode_stamps
from stella_shared.evidence.transparency import bundle, certificate, proof_of_log, trust
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.entry import Verifier
from stella_shared.evidence.vouching import Trust

KINDS = ("v1", "v2", "keyless")


class Known:
    """One of the chains, read back."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder / "known" / kind
        self.evidence, self.head = self.folder / "evidence", self.folder / "head.json"
        self.root = trust.parse((self.folder / "root.json").read_bytes())
        said = json.loads((self.folder / "keys.json").read_bytes())
        who = frozenset(Identity(*pair) for pair in said["identities"])
        self.trust = Trust(dict.fromkeys(said["keys"], ""), who, self.root)

    def file(self, index: int, kind: str) -> bytes:
        """Return the bytes of a chunk's file."""
        return (self.evidence / names.chunk_file(index, kind)).read_bytes()

    def verifier(self, index: int) -> Verifier:
        """Return what a chunk's signature is checked with."""
        if (self.evidence / names.chunk_file(index, names.CERTIFICATE)).exists():
            return proof_of_log.verifier_of(None, certificate.load(self.file(index, names.CERTIFICATE)))
        key_id = dsse.open_envelope(self.file(index, names.ENVELOPE)).key_id
        return Verifier(keys.load_public((self.evidence / names.KEYS / f"{key_id}.pem").read_bytes()))


def make(folder: Path) -> None:
    """Make the chains and the seeds."""
    from tests.evidence.chain_maker import Node, small_chain
    from tests.signer.log_kit import Queue, surroundings
    from tests.signer.test_remote_keys import WHO, Keyless, keyless_chain
    from tests.sigstore.fulcio import Fulcio

    with ExitStack() as stack:
        fulcio = stack.enter_context(Fulcio())
        for kind in KINDS:
            around = stack.enter_context(surroundings(1 if kind == "v1" else 2))
            around.log.grow(5, api=around.version)
            at = folder / "made" / kind
            at.mkdir(parents=True)
            if kind == "keyless":
                around = Keyless(around, fulcio)
                node: Node = anyio.run(keyless_chain, at, around)
            else:
                node = small_chain(at)
            anyio.run(Queue(at, around, node).round)
            known = folder / "known" / kind
            shutil.copytree(node.evidence, known / "evidence")
            shutil.copy(node.where.head, known / "head.json")
            said: dict[str, Any] = {
                "keys": list(keys.load_trusted(node.where.state)), "identities": [[WHO.subject, WHO.issuer]]
            }  # fmt: skip
            (known / "keys.json").write_text(json.dumps(said))
            (known / "root.json").write_bytes(around.services().root.document)
    _seed(folder)


def _seed(folder: Path) -> None:
    """Write each fuzzer's first inputs: the real documents, by their places."""

    def put(name: str, data: bytes) -> None:
        into = folder / "corpus" / name
        into.mkdir(parents=True, exist_ok=True)
        (into / str(len(list(into.iterdir())))).write_bytes(data)

    for kind in KINDS:
        known = Known(folder, kind)
        for index in (1, 2, 3):
            envelope, proofs = known.file(index, names.ENVELOPE), known.file(index, names.BUNDLE)
            put("statement", envelope)
            put("statement", dsse.open_envelope(envelope).payload)
            put("ledger", known.file(index, names.LEDGER))
            put("ledger", known.file(index, names.DATA))
            put("bundle", proofs)
            for entry in bundle.decode(proofs).verification_material.tlog_entries:
                put("checkpoint", entry.inclusion_proof.checkpoint.envelope.encode())
            put("timestamp", known.file(index, names.STAMPS))
            put("timestamp", decode_stamps(known.file(index, names.STAMPS))[0])
            if kind == "keyless":
                put("timestamp", known.verifier(index).certificate)
        for n, path in enumerate(chain_files(known)):
            put("chain", bytes([KINDS.index(kind), n]) + path.read_bytes())
        for suffix in ("tar", "tar.gz"):
            archive = folder / f"seed.{suffix}"
            with tarfile.open(archive, "w:gz" if suffix != "tar" else "w") as tar:
                tar.add(known.evidence, "evidence")
            put("archive", archive.read_bytes())
    root = canonical.dumps(json.loads((folder / "known" / "v2" / "root.json").read_bytes()))
    put("checkpoint", root)


def chain_files(known: Known) -> list[Path]:
    """Return the files of a chain that are not empty, in a fixed order, the head last."""
    return [*sorted(p for p in known.evidence.rglob("*") if p.is_file() and p.stat().st_size), known.head]
