"""RFC 3161 timestamps and the file that holds them: no other time is believed, and nothing but `ValueError`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stella_shared.evidence import dsse, keys, names
from stella_shared.evidence.stamps import Stamps, decode_stamps, encode_stamps
from stella_shared.evidence.transparency import certificate, timestamp
from tests.fuzz.known import Known


def target(folder: Path) -> Callable[[bytes], None]:
    """Return what is fuzzed."""
    known = Known(folder, "v2")
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
        for load in (certificate.load, keys.load_public):
            try:
                loaded = load(data)  # type: ignore[operator]
            except ValueError:
                continue
            if load is certificate.load:
                try:
                    certificate.identity(loaded)
                except ValueError:
                    continue

    return one
