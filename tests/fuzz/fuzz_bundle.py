"""Sigstore bundles: one is accepted only if it proves what the real one proves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stella_shared.evidence import names
from stella_shared.evidence.transparency import bundle, proof_of_log
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    subjects = []
    for kind in ("v1", "v2"):
        known = Known(folder, kind)
        envelope, verifier = known.file(2, names.ENVELOPE), known.verifier(2)
        proof = proof_of_log.check(known.file(2, names.BUNDLE), envelope, verifier, known.root)
        subjects.append((known.root, envelope, verifier, proof))

    def one(data: bytes) -> None:
        try:
            decoded = bundle.decode(data)
        except ValueError:
            return
        assert bundle.encode(decoded) == data, "one bundle has two texts"
        for root, envelope, verifier, real in subjects:
            try:
                proof = proof_of_log.check(data, envelope, verifier, root)
            except ValueError:
                continue
            assert {(e.log, e.index, e.size) for e in proof.logged} == {(e.log, e.index, e.size) for e in real.logged}
            assert {time.at for time in proof.times} <= {time.at for time in real.times}

    return one
