"""`NNNNNN.stamps.json`: RFC 3161 timestamps over a chunk's signature, kept before the log is asked."""

from __future__ import annotations

import base64
from typing import Final, Self

import msgspec

from stella_shared.evidence import canonical
from stella_shared.evidence.transparency import bundle, timestamp

_FORMAT: Final = 1


class Stamps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON of `NNNNNN.stamps.json`: TimeStampResp in DER, base64."""

    format: int
    timestamps: list[str]

    @classmethod
    def of(cls, responses: list[bytes]) -> Self:
        """Return the document of these responses."""
        return cls(_FORMAT, [base64.b64encode(response).decode() for response in responses])


def encode_stamps(stamps: Stamps) -> bytes:
    """Return the document's canonical bytes."""
    return canonical.dumps(stamps)


def decode_stamps(data: bytes) -> list[bytes]:
    """Return the responses.  Raises `ValueError` unless it is exactly of the form that `encode_stamps` writes."""
    if len(data) > bundle.MAX_TIMESTAMPS * timestamp.MAX_BYTES * 2:
        raise ValueError(f"{len(data)} bytes of timestamps are more than anybody needs")
    stamps = canonical.loads(data, Stamps)
    if stamps.format != _FORMAT or not 0 < len(stamps.timestamps) <= bundle.MAX_TIMESTAMPS:
        raise ValueError(f"{len(stamps.timestamps)} timestamps in format {stamps.format}")
    return [canonical.base64_bytes(text) for text in stamps.timestamps]
