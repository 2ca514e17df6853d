"""Checkpoints and trusted roots: what is signed by the log is what it signed, and nothing but `ValueError`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from stella_shared.evidence import names
from stella_shared.evidence.transparency import bundle, checkpoint, trust
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    logs, signed = [], set()
    for kind in ("v1", "v2", "keyless"):
        known = Known(folder, kind)
        logs += known.root.logs
        for index in (1, 2, 3):
            for entry in bundle.decode(known.file(index, names.BUNDLE)).verification_material.tlog_entries:
                signed.add(checkpoint.parse(entry.inclusion_proof.checkpoint.envelope).note)

    def one(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            trust.parse(data)
        try:
            read = checkpoint.parse(data.decode("utf-8", "surrogateescape"))
        except ValueError:
            return
        assert read.size >= 0 and len(read.root) == 32
        for log in logs:
            try:
                checkpoint.check_signature(read, log)
            except ValueError:
                continue
            assert read.note in signed, "accepted, and never signed"

    return one
