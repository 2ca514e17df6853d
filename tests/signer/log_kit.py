"""A log, a timestamp authority and a chain beside each other, and a submitter between them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from tests.evidence.chain_maker import Node, small_chain
from tests.sigstore import trust
from tests.sigstore.log_standin import LogStandin
from tests.sigstore.tsa import Tsa

from stella_shared.evidence import names
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.transparency import proof_of_log
from stella_shared.evidence.transparency.proof_of_log import Proof
from stella_signer import trust_config
from stella_signer.outside import Outside
from stella_signer.submission import Round, Submitter
from stella_signer.trust_config import Services


class Surroundings:
    """What a signer talks to: a log of one API version, and timestamp authorities; `others` add their logs."""

    def __init__(self, log: LogStandin, tsas: list[Tsa], version: int, selector: str = "ALL") -> None:
        self.log, self.tsas, self.version, self.selector = log, tsas, version, selector
        self.others: list[Surroundings] = []

    def documents(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (trusted root, signing config)."""
        logs = [self, *self.others]
        root = trust.trusted_root(
            tlogs=[tlog for around in logs for tlog in around.log.trusted_root_tlogs()],
            tsas=[tsa.trusted_root_tsa() for tsa in self.tsas],
        )
        config = trust.signing_config(
            rekor=[trust.service(around.log.url, around.version, str(i)) for i, around in enumerate(logs)],
            tsas=[trust.service(tsa.url, operator=str(i)) for i, tsa in enumerate(self.tsas)],
            selector=self.selector,
        )
        return root, config

    def services(self) -> Services:
        """Return what the signer makes of it."""
        root, config = self.documents()
        return trust_config.choose(json.dumps(root).encode(), json.dumps(config).encode(), datetime.now(UTC))

    def write(self, folder: Path) -> Path:
        """Write a ClientTrustConfig into `folder` and return its path."""
        path = folder / "trust_config.json"
        path.write_text(json.dumps(trust.client_trust_config(*self.documents())))
        return path


@contextlib.contextmanager
def surroundings(version: int, tsas: int = 1, selector: str = "ALL", **log: Any) -> Iterator[Surroundings]:
    """Give a log with `tsas` timestamp authorities, all on loopback."""
    with contextlib.ExitStack() as stack:
        standin = stack.enter_context(LogStandin(**log))
        stamping = [stack.enter_context(Tsa(name=f"tsa {n}")) for n in range(tsas)]
        yield Surroundings(standin, stamping, version, selector)


class Queue:
    """A chain whose chunks are to be logged."""

    def __init__(self, folder: Path, around: Surroundings, node: Node | None = None) -> None:
        self.around = around
        self.node = node or small_chain(folder)

    async def round(self, disk: Disk | None = None, **options: Any) -> tuple[Round, Submitter]:
        """Run one round of a fresh submitter; `options` are the submitter's and the round's."""
        retry, most = options.pop("retry_rejected", False), options.pop("most", 64)
        async with Outside() as outside:
            submitter = Submitter(self.node.where, outside, self.around.services(), disk=disk, **options)
            return await submitter.round(retry_rejected=retry, most=most), submitter

    def logged(self) -> list[int]:
        """Return the chunks that have a bundle."""
        return sorted(int(path.name[:6]) for path in self.node.evidence.glob(f"*.{names.BUNDLE}"))

    def bundle(self, index: int) -> bytes:
        """Return a chunk's bundle."""
        return self.node.file(index, names.BUNDLE).read_bytes()

    def proof(self, index: int) -> Proof:
        """Return what a chunk's bundle proves to somebody with the trusted root."""
        envelope = self.node.file(index, names.ENVELOPE).read_bytes()
        verifier = proof_of_log.verifier_of(self.node.key._key.public_key(), None)
        return proof_of_log.check(self.bundle(index), envelope, verifier, self.around.services().root)


def logged(folder: Path, node: Node, keep: int) -> None:
    """Have a node's chunks logged, and leave only the bundles of those up to `keep`: the later ones are pending."""
    with surroundings(2) as around:
        anyio.run(Queue(folder, around, node).round)
    for path in node.evidence.glob(f"*.{names.BUNDLE}"):
        if int(path.name[:6]) > keep:
            path.unlink()
    (node.where.state / "checkpoints.json").unlink()
