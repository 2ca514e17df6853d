"""DSSE envelopes and the statements in them: one text for one value, and nothing but `ValueError`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stella_shared.evidence import dsse, keys, statement
from stella_shared.evidence.vouching import Files, vouch
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    known = Known(folder, "v2")
    public = {keys.key_id(known.verifier(n).key): known.verifier(n).key for n in (1, 2)}
    signed = {dsse.open_envelope(known.file(n, "dsse.json")).payload for n in (1, 2, 3, 4)}

    def one(data: bytes) -> None:
        payload = data
        try:
            opened = dsse.open_envelope(data)
            assert dsse.seal(opened.payload, opened.key_id, opened.signature) == data, "one envelope has two texts"
            payload = opened.payload
        except ValueError:
            pass
        else:
            verdict = vouch(data, Files(), public, known.trust)
            assert not verdict.trusted or verdict.objections or payload in signed, "accepted, and never signed"
        try:
            statement.decode(payload)
        except ValueError:
            return

    return one
