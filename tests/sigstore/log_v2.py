"""Rekor v2's side of the stand-in: a submission waits for the next checkpoint; reads are tiles (C2SP tlog-tiles)."""

from __future__ import annotations

import hashlib
import json
import re
import threading

from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.sigstore.door import Answer, Reply, Request, json_reply
from tests.sigstore.log_entries import RefusedError, body_v2, encode
from tests.sigstore.log_v1 import forgeries
from tests.sigstore.merkle_tree import Tree, leaf_hash

PATH = "/api/v2"
PATIENCE_SECONDS = 20.0
_TILE = re.compile(r"/tile/(entries|[0-5]?[0-9])/((?:x\d{3}/)*\d{3})(?:\.p/(\d{1,3}))?")


def error(status: int, code: int, message: str, headers: dict[str, str] | None = None) -> Reply:
    """Return an error as the gateway before Rekor v2 writes it; `code` is gRPC's."""
    return json_reply(status, {"code": code, "message": message, "details": []}, headers)


class LogV2:
    """One shard.  It publishes what came in since the last checkpoint each `interval_seconds`, when something did."""

    def __init__(self, origin: str, interval_seconds: float) -> None:
        self.key = ed25519.Ed25519PrivateKey.generate()
        self.spki = self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        raw = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        # C2SP signed-note: the first four bytes are the key id of a note, the whole is the id of the log.
        self.log_id = hashlib.sha256(origin.encode() + b"\n\x01" + raw).digest()
        self.witness_lines: list[str] = []
        self.frozen = False
        self._origin, self._interval_seconds = origin, interval_seconds
        self._changed = threading.Condition()
        self._closing = False
        self.tree = Tree()
        self.bodies: list[bytes] = []
        self._index: dict[bytes, int] = {}
        self.published = 0
        self._publisher = threading.Thread(target=self._publish_for_ever, name="log v2")

    def open(self) -> None:
        """Begin to publish."""
        self._publisher.start()

    def close(self) -> None:
        """End the publishing, and whoever waits for it."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._publisher.join()

    def _publish_for_ever(self) -> None:
        with self._changed:
            while not self._closing:
                self._changed.wait_for(lambda: self._closing or self.tree.size > self.published)
                # What comes in now shares the checkpoint.
                self._changed.wait_for(lambda: self._closing, self._interval_seconds)
                self.published = self.tree.size
                self._changed.notify_all()

    def append(self, body: bytes) -> tuple[int, bool]:
        """Add an entry; return its index, and whether it is new."""
        leaf = leaf_hash(body)
        with self._changed:
            if leaf in self._index:
                return self._index[leaf], False
            self._index[leaf] = self.tree.append(leaf)
            self.bodies.append(body)
            self._changed.notify_all()
            return self._index[leaf], True

    def publish(self) -> None:
        """Publish all there is at once."""
        with self._changed:
            self.published = self.tree.size
            self._changed.notify_all()

    def fork(self, keep: int | None, forged: int | None) -> None:
        """Forget all but `keep` published entries (half of them), put `forged` others (as many) there, and publish."""
        with self._changed:
            keep = self.published // 2 if keep is None else keep
            bodies = self.bodies[:keep] + forgeries(2, self.published - keep if forged is None else forged)
            self.tree, self.bodies, self._index = Tree(), bodies, {}
            for body in bodies:
                self._index[leaf_hash(body)] = self.tree.append(leaf_hash(body))
            self.published = self.tree.size
            self._changed.notify_all()

    def checkpoint(self, size: int) -> str:
        """Return the signed checkpoint of that size, with the lines of the witnesses."""
        note = f"{self._origin}\n{size}\n{encode(self.tree.root(size))}\n"
        own = f"— {self._origin} {encode(self.log_id[:4] + self.key.sign(note.encode()))}"
        return "\n".join([note, own, *self.witness_lines]) + "\n"

    def route_write(self, request: Request) -> tuple[str, Answer] | None:
        """Return what answers a submission, or None."""
        if (request.method, request.path) == ("POST", f"{PATH}/log/entries"):
            return "v2.submit", self._submit
        return None

    def route_read(self, path: str) -> tuple[str, Answer] | None:
        """Return what answers a read of a path below the log's reading prefix, or None."""
        if path == "/checkpoint":
            return "v2.checkpoint", self._checkpoint
        tile = _TILE.fullmatch(path)
        if tile is None or (tile[3] and not 1 <= int(tile[3]) <= 255):
            return None
        level, index = tile[1], int(tile[2].replace("x", "").replace("/", ""))
        width = int(tile[3] or 256)
        if level == "entries":
            return "v2.entries", lambda _: self._bundle(index, width)
        return "v2.tile", lambda _: self._tile(int(level), index, width)

    def _submit(self, request: Request) -> Reply:
        if self.frozen:
            return Reply(405, b"This log has been frozen, please switch to the latest log.\n")
        try:
            body = body_v2(json.loads(request.body))
        except (RefusedError, ValueError) as refusal:
            return error(400, 3, f"invalid hashedrekord request: {refusal}")
        index, new = self.append(body)
        if not new:
            message = f"an equivalent entry already exists in the transparency log with index {index}"
            return error(409, 6, message, {"x-log-index": str(index)})
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self.published > index, PATIENCE_SECONDS)
            if self.published <= index:
                return error(504, 4, "context deadline exceeded")
            size = self.published
            entry = {
                "logIndex": str(index),
                "logId": {"keyId": encode(self.log_id)},
                "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
                "integratedTime": "0",
                "inclusionPromise": None,
                "inclusionProof": {
                    "logIndex": str(index),
                    "rootHash": encode(self.tree.root(size)),
                    "treeSize": str(size),
                    "hashes": [encode(one) for one in self.tree.inclusion(index, size)],
                    "checkpoint": {"envelope": self.checkpoint(size)},
                },
                "canonicalizedBody": encode(body),
            }
        return json_reply(201, entry)

    def _checkpoint(self, request: Request) -> Reply:
        with self._changed:
            text = self.checkpoint(self.published)
        return Reply(200, text.encode(), {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-cache"})

    def _tile(self, level: int, index: int, width: int) -> Reply:
        with self._changed:
            return _bytes(self.tree.tile(level, index, width, self.published))

    def _bundle(self, index: int, width: int) -> Reply:
        with self._changed:
            bodies = self.bodies[: self.published][index * 256 : index * 256 + width]
        if len(bodies) < width:
            return Reply(404)
        return _bytes(b"".join(len(body).to_bytes(2, "big") + body for body in bodies))


def _bytes(data: bytes | None) -> Reply:
    return Reply(404) if data is None else Reply(200, data, {"Content-Type": "application/octet-stream"})
