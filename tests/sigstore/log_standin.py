"""A stand-in for Rekor v1 and v2 on loopback, because no package brings a real one; it says so in its `Server` header.

It keeps real Merkle trees, checks what is submitted, and signs as the real ones do, so that any Sigstore verifier
accepts what it gives.
`tests/sigstore/test_kit.py` holds it against known vectors, independent verifiers, and a real log where there is one.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.sigstore import log_v1, log_v2
from tests.sigstore.door import Answer, Door, Request
from tests.sigstore.log_entries import encode
from tests.sigstore.log_v1 import LogV1, forgeries
from tests.sigstore.log_v2 import LogV2, error

SERVER = "stella-log-standin"


class LogStandin(Door):
    """Serves both APIs at `url`, with a tree and a key for each.

    Endpoints, as `requests` counts them and `on` names them: `v1.submit`, `v1.entry`, `v1.log`, `v1.proof`, `v1.key`,
    `v2.submit`, `v2.checkpoint`, `v2.tile`, `v2.entries`.
    Faults are those of `Door`; without `on` they hit submissions.

    `read_url` is the prefix of v2 reads: `<read_url>/checkpoint`, `<read_url>/tile/...`.
    With `separate_reads` these have a port of their own (`reads`, a `Door` too), and `url` refuses them.
    `first_index_v1` is how many entries stand in shards before that of v1.
    """

    def __init__(
        self, *, checkpoint_seconds: float = 0.05, separate_reads: bool = False, first_index_v1: int = 0
    ) -> None:
        super().__init__(self._answers, SERVER, faults_on="submit")
        self.v1 = LogV1(self.host, first_index_v1)
        self.v2 = LogV2(self.host, checkpoint_seconds)
        self.reads = Door(lambda request: self.v2.route_read(request.path), SERVER, "") if separate_reads else None
        self.read_url = self.url + log_v2.PATH if self.reads is None else self.reads.url

    def __enter__(self) -> Self:
        self.v2.open()
        if self.reads is not None:
            self.reads.up()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.v2.close()
        try:
            if self.reads is not None:
                self.reads.__exit__(kind, error, trace)
        finally:
            super().__exit__(kind, error, trace)

    def _answers(self, request: Request) -> tuple[str, Answer] | None:
        if request.path.startswith(log_v1.PATH):
            return self.v1.route(request)
        written = self.v2.route_write(request)
        if written is not None or not request.path.startswith(log_v2.PATH):
            return written
        read = self.v2.route_read(request.path.removeprefix(log_v2.PATH))
        if read is None or self.reads is None:
            return read
        return read[0], lambda _: error(501, 12, "reads are not implemented here")

    @property
    def v1_key(self) -> ec.EllipticCurvePrivateKey:
        """The key that signs for v1."""
        return self.v1.key

    @property
    def v2_key(self) -> ed25519.Ed25519PrivateKey:
        """The key that signs for v2."""
        return self.v2.key

    @property
    def v1_time_skew(self) -> int:
        """Seconds by which v1's time of integration is off, for entries from now on."""
        return self.v1.time_skew

    @v1_time_skew.setter
    def v1_time_skew(self, seconds: int) -> None:
        self.v1.time_skew = seconds

    @property
    def witness_lines(self) -> list[str]:
        """Signature lines, each `— name base64`, that stand behind the log's own on v2 checkpoints."""
        return self.v2.witness_lines

    @witness_lines.setter
    def witness_lines(self, lines: list[str]) -> None:
        self.v2.witness_lines = lines

    def freeze(self) -> None:
        """Take no more v2 submissions, as a shard whose successor has begun: 405, in Rekor's own words."""
        self.v2.frozen = True

    def grow(self, n: int, api: int = 2) -> None:
        """Let others submit `n` entries, at once published."""
        shard = self._shard(api)
        for body in forgeries(api, n):
            shard.append(body)
        if api == 2:
            self.v2.publish()

    def split_view(self, *, keep: int | None = None, forged: int | None = None, api: int = 0) -> None:
        """Serve another history from now on, and sign it.

        The first `keep` entries stay (half of them); `forged` foreign ones follow (as many as were dropped).
        With `forged=0` the log is truncated.  `api` is 1 or 2, or 0 for both.
        """
        for version in (1, 2):
            if api in (0, version):
                self._shard(version).fork(keep, forged)

    def _shard(self, api: int) -> LogV1 | LogV2:
        return self.v1 if api == 1 else self.v2

    def trusted_root_tlogs(self, *apis: int, start: str = "2020-01-01T00:00:00Z") -> list[dict[str, Any]]:
        """Return what a trusted_root.json says of the log under `tlogs`, for v1, v2 or (without `apis`) both."""
        details = {1: "PKIX_ECDSA_P256_SHA_256", 2: "PKIX_ED25519"}
        return [
            {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": encode(self._shard(api).spki),
                    "keyDetails": details[api],
                    "validFor": {"start": start},
                },
                "logId": {"keyId": encode(self._shard(api).log_id)},
            }
            for api in apis or (1, 2)
        ]
