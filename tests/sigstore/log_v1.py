"""Rekor v1's side of the stand-in: an entry is in the tree when its reply is sent, with a signed promise and a time."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from typing import Any

import rfc8785
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.sigstore.door import Answer, Reply, Request, json_reply
from tests.sigstore.log_entries import RefusedError, body_v1, encode
from tests.sigstore.merkle_tree import Tree, leaf_hash

PATH = "/api/v1/log"
TREE_ID = 4001234567890123456


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    """Return an error as Rekor v1 writes it."""
    return json_reply(status, {"code": status, "message": message}, headers)


class LogV1:
    """One shard of a log.

    `first_index` entries stand in shards before it: an index in the log is that much above one in the tree.
    """

    def __init__(self, host: str, first_index: int) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.spki = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.log_id = hashlib.sha256(self.spki).digest()
        self.time_skew = 0
        self._host, self._first_index = host, first_index
        self._lock = threading.Lock()
        self.tree = Tree()
        self.bodies: list[bytes] = []
        self._times: list[int] = []
        self._index: dict[bytes, int] = {}

    def append(self, body: bytes) -> tuple[int, bool]:
        """Add an entry; return its index in the tree, and whether it is new."""
        leaf = leaf_hash(body)
        with self._lock:
            if leaf in self._index:
                return self._index[leaf], False
            self._index[leaf] = self.tree.append(leaf)
            self.bodies.append(body)
            self._times.append(int(time.time()) + self.time_skew)
            return self._index[leaf], True

    def fork(self, keep: int | None, forged: int | None) -> None:
        """Forget all but `keep` entries (half of them), and put `forged` others (as many) in their place."""
        with self._lock:
            size = self.tree.size
            keep = size // 2 if keep is None else keep
            times = self._times[:keep]
            bodies = self.bodies[:keep] + forgeries(1, size - keep if forged is None else forged)
            times += [int(time.time())] * (len(bodies) - keep)
            self.tree, self.bodies, self._times, self._index = Tree(), bodies, times, {}
            for body in bodies:
                self._index[leaf_hash(body)] = self.tree.append(leaf_hash(body))

    def checkpoint(self, size: int) -> str:
        """Return the signed tree head of that size."""
        note = f"{self._host} - {TREE_ID}\n{size}\n{encode(self.tree.root(size))}\n"
        signature = self.key.sign(note.encode(), ec.ECDSA(hashes.SHA256()))
        return f"{note}\n— {self._host} {encode(self.log_id[:4] + signature)}\n"

    def route(self, request: Request) -> tuple[str, Answer] | None:
        """Return what answers a request, or None."""
        path = request.path.removeprefix(PATH)
        if request.method == "POST":
            return ("v1.submit", self._submit) if path == "/entries" else None
        if path.startswith("/entries/"):
            return "v1.entry", self._by_uuid
        return {
            "": ("v1.log", self._state),
            "/entries": ("v1.entry", self._by_index),
            "/proof": ("v1.proof", self._proof),
            "/publicKey": ("v1.key", self._public_key),
        }.get(path)

    def _uuid(self, index: int) -> str:
        return f"{TREE_ID:016x}{self.tree.leaf(index).hex()}"

    def _submit(self, request: Request) -> Reply:
        try:
            body = body_v1(json.loads(request.body))
        except (RefusedError, ValueError) as refusal:
            return error(400, f"error processing entry: {refusal}")
        index, new = self.append(body)
        uuid = self._uuid(index)
        location = {"Location": f"{PATH}/entries/{uuid}"}
        if not new:
            return error(409, f"an equivalent entry already exists in the transparency log with UUID {uuid}", location)
        return json_reply(201, self._entry(index), {**location, "ETag": uuid})

    def _entry(self, index: int) -> dict[str, Any]:
        with self._lock:
            size = self.tree.size
            promised: dict[str, Any] = {
                "body": base64.b64encode(self.bodies[index]).decode(),
                "integratedTime": self._times[index],
                "logID": self.log_id.hex(),
                "logIndex": self._first_index + index,
            }
            proof = {
                "checkpoint": self.checkpoint(size),
                "hashes": [one.hex() for one in self.tree.inclusion(index, size)],
                "logIndex": index,
                "rootHash": self.tree.root(size).hex(),
                "treeSize": size,
            }
        promise = self.key.sign(rfc8785.dumps(promised), ec.ECDSA(hashes.SHA256()))
        verification = {"inclusionProof": proof, "signedEntryTimestamp": encode(promise)}
        return {self._uuid(index): {**promised, "verification": verification}}

    def _by_uuid(self, request: Request) -> Reply:
        uuid = request.path.rpartition("/")[2]
        try:
            leaf, tree = bytes.fromhex(uuid[-64:]), uuid[:-64]
        except ValueError:
            return error(400, "UUID must be a 64-character hexadecimal string")
        index = self._index.get(leaf)
        if index is None or tree not in ("", f"{TREE_ID:016x}"):
            return Reply(404)
        return json_reply(200, self._entry(index))

    def _by_index(self, request: Request) -> Reply:
        index = _number(request, "logIndex", -1) - self._first_index
        return json_reply(200, self._entry(index)) if 0 <= index < self.tree.size else Reply(404)

    def _state(self, request: Request) -> Reply:
        with self._lock:
            size = self.tree.size
            state = {
                "inactiveShards": [],
                "rootHash": self.tree.root(size).hex(),
                "signedTreeHead": self.checkpoint(size),
                "treeID": str(TREE_ID),
                "treeSize": size,
            }
        return json_reply(200, state)

    def _proof(self, request: Request) -> Reply:
        first, last = _number(request, "firstSize", 1), _number(request, "lastSize", 0)
        with self._lock:
            if first < 1 or last < 1:
                return error(422, "firstSize and lastSize must be at least 1")
            if first > last:
                return error(400, f"firstSize({first}) must be less than lastSize({last})")
            if last > self.tree.size:
                asked = f"the tree size requested({last})"
                return error(400, f"{asked} was greater than what is currently observable({self.tree.size})")
            hashes_ = [one.hex() for one in self.tree.consistency(first, last)]
            # As Rekor does: the root is that of the tree as it is now, whatever lastSize was asked for.
            return json_reply(200, {"hashes": hashes_, "rootHash": self.tree.root().hex()})

    def _public_key(self, request: Request) -> Reply:
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return Reply(200, pem, {"Content-Type": "application/x-pem-file"})


def forgeries(version: int, n: int) -> list[bytes]:
    """Return `n` entries that nobody submitted; no two calls return the same."""
    stamp = time.monotonic_ns()
    return [rfc8785.dumps({"apiVersion": f"0.0.{version}", "kind": "nothing", "spec": [stamp, i]}) for i in range(n)]


def _number(request: Request, name: str, default: int) -> int:
    text = request.query.get(name, "")
    return int(text) if text.isdigit() else default
