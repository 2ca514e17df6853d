"""Timestamps and certificates: no other time, nobody else is believed, and nothing is raised but `ValueError`."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from pathlib import Path

from stella_shared.evidence import dsse, keys, names
from stella_shared.evidence.stamps import Stamps, decode_stamps, encode_stamps
from stella_shared.evidence.transparency import certificate, timestamp
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    known, keyless = Known(folder, "v2"), Known(folder, "keyless")
    signed = {keyless.file(index, names.CERTIFICATE) for index in (1, 2, 3)}
    issued = certificate.load(keyless.file(1, names.CERTIFICATE)).not_valid_before_utc
    real = {}
    for index in (1, 2, 3):
        signature = dsse.open_envelope(known.file(index, names.ENVELOPE)).signature
        (response,) = decode_stamps(known.file(index, names.STAMPS))
        real[signature] = timestamp.check(response, signature, known.root)

    def one(data: bytes) -> None:
        responses = [data]
        try:
            responses += decode_stamps(data)
            assert encode_stamps(Stamps.of(responses[1:])) == data, "one list has two texts"
        except ValueError:
            pass
        for response in responses:
            for signature, at in real.items():
                try:
                    assert timestamp.check(response, signature, known.root) == at, "another time"
                except ValueError:
                    continue
        for pem in (data, b"-----BEGIN CERTIFICATE-----\n" + _text(data) + b"-----END CERTIFICATE-----\n"):
            try:
                loaded = certificate.load(pem)
                certificate.identity(loaded)
                certificate.check(loaded, [issued], keyless.root)
            except ValueError:
                continue
            assert pem in signed, "another certificate is believed"
        with contextlib.suppress(ValueError):
            keys.load_public(data)

    return one


def _text(data: bytes) -> bytes:
    """Return the lines of a PEM file."""
    text = base64.b64encode(data)
    return b"".join(text[at : at + 64] + b"\n" for at in range(0, len(text), 64))
