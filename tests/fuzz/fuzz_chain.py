"""A whole chain with one file of another content: the answer is INVALID, or a weaker one where only proofs changed.

The first byte of an input chooses the chain, the second the file, the rest is what the file holds.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from stella_shared.errors import StellaError
from stella_shared.evidence import names
from stella_shared.evidence.report import VALID_PENDING
from stella_shared.evidence.verify import verify_chain
from tests.fuzz.known import KINDS, Known, chain_files


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    room = Path(tempfile.mkdtemp(prefix="fuzz-chain-", dir=folder))
    shutil.copytree(folder / "known", room / "known")
    chains = [Known(room, kind) for kind in KINDS]
    files = [[(path, path.read_bytes()) for path in chain_files(known)] for known in chains]
    said = [verify_chain(known.evidence, trust=known.trust, head=known.head) for known in chains]
    assert all(report.valid for report in said)

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        n = data[0] % len(chains)
        path, whole = files[n][data[1] % len(files[n])]
        changed = data[2:]
        path.write_bytes(changed)
        try:
            report = verify_chain(chains[n].evidence, trust=chains[n].trust, head=chains[n].head)
        except StellaError:
            return
        finally:
            path.write_bytes(whole)
        if not report.valid or changed == whole:
            return
        assert path.name.endswith((names.STAMPS, names.BUNDLE)), f"{path.name} was changed, and the chain is VALID"
        for before, now in zip(said[n].chunks, report.chunks, strict=True):
            assert (before.statement_sha256, before.chunk_sha256) == (now.statement_sha256, now.chunk_sha256)
            assert now.status != VALID_PENDING
            assert not now.trusted_time or now.trusted_time >= before.trusted_time

    return one
