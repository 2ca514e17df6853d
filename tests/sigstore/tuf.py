"""A private TUF repository on loopback, built by python-tuf: it hands out trusted_root.json and the signing config."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from tests.sigstore.door import Answer, Door, Reply, Request

SERVER = "stella-tuf"
ROLES = ("root", "targets", "snapshot", "timestamp")


class TufRepository(Door):
    """Serves the repository at `url`; `root_path` is the root that clients are given by another way.

    `publish` puts new documents in, as a later version; `expires` is how long metadata holds from then on.
    The switches are those of `Door`; the endpoints are the names of the metadata's roles, and `target`.
    """

    def __init__(
        self,
        trusted_root: dict[str, Any],
        signing_config: dict[str, Any] | None = None,
        *,
        expires: timedelta = timedelta(days=30),
    ) -> None:
        super().__init__(self._answers, SERVER, faults_on="")
        self.expires = expires
        self.version = 0
        self._signers = {role: CryptoSigner.generate_ecdsa() for role in ROLES}
        self._files: dict[str, bytes] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="tuf-")
        self.root_path = Path(self._folder.name) / "root.json"
        root = Root(expires=self._expiry(), consistent_snapshot=True)
        for role, signer in self._signers.items():
            root.add_key(signer.public_key, role)
        self._put("1.root.json", "root", root)
        self.root_path.write_bytes(self._files["1.root.json"])
        self.publish(trusted_root, signing_config)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._folder.cleanup()

    def publish(self, trusted_root: dict[str, Any], signing_config: dict[str, Any] | None = None) -> None:
        """Hand out these documents from now on."""
        self.version += 1
        documents = {"trusted_root.json": trusted_root}
        if signing_config is not None:
            documents["signing_config.v0.2.json"] = signing_config
        targets = Targets(version=self.version, expires=self._expiry())
        for name, document in documents.items():
            content = json.dumps(document).encode()
            target = TargetFile.from_data(name, content, ["sha256"])
            targets.targets[name] = target
            self._files[f"targets/{target.hashes['sha256']}.{name}"] = content
        snapshot = Snapshot(version=self.version, expires=self._expiry(), meta={"targets.json": MetaFile(self.version)})
        timestamp = Timestamp(version=self.version, expires=self._expiry(), snapshot_meta=MetaFile(self.version))
        self._put(f"{self.version}.targets.json", "targets", targets)
        self._put(f"{self.version}.snapshot.json", "snapshot", snapshot)
        # Last: it is what makes the others current.
        self._put("timestamp.json", "timestamp", timestamp)

    def _expiry(self) -> datetime:
        return datetime.now(UTC).replace(microsecond=0) + self.expires

    def _put(self, name: str, role: str, signed: Root | Targets | Snapshot | Timestamp) -> None:
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(self._signers[role])
        self._files[name] = metadata.to_bytes()

    def _answers(self, request: Request) -> tuple[str, Answer] | None:
        name = request.path.removeprefix("/")
        content = self._files.get(name)
        role = name.removesuffix(".json").rpartition(".")[2]
        endpoint = "target" if name.startswith("targets/") else role
        return endpoint, lambda _: Reply(404) if content is None else Reply(200, content)
