"""RFC 3161 timestamps: that an authority saw a signature, and when.  Verified by rfc3161-client."""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from typing import Final

from rfc3161_client import TimeStampResponse, VerifierBuilder, decode_timestamp_response

from stella_shared.evidence.transparency.trust import Authority, TrustRoot

MAX_BYTES: Final = 64 << 10


def parse(response: bytes) -> TimeStampResponse:
    """Return a TimeStampResp in DER.  Raises `ValueError`."""
    if len(response) > MAX_BYTES:
        raise ValueError(f"a timestamp of {len(response)} bytes is over {MAX_BYTES}")
    try:
        parsed = decode_timestamp_response(response)
        _ = parsed.tst_info
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the parser is Rust, and its panics are no Exception
        raise ValueError(f"no RFC 3161 timestamp: {e}") from None
    return parsed


def is_of(response: TimeStampResponse, signature: bytes) -> bool:
    """Return whether the timestamp is of SHA-256 of `signature`."""
    return bool(response.tst_info.message_imprint.message == sha256(signature).digest())


def check(response: bytes, signature: bytes, root: TrustRoot) -> datetime:
    """Return when a trusted authority saw `signature`.  Raises `ValueError` when none says so."""
    parsed = parse(response)
    if not is_of(parsed, signature):
        raise ValueError("the timestamp is of another signature")
    for authority in root.timestamp_authorities:
        at = parsed.tst_info.gen_time
        if _vouches(authority, parsed, signature) and authority.validity.holds(at):
            return at
    raise ValueError("the timestamp is of no trusted authority")


def _vouches(authority: Authority, response: TimeStampResponse, signature: bytes) -> bool:
    leaf, *between = authority.certificates
    builder = VerifierBuilder(intermediates=between[:-1], roots=[between[-1] if between else leaf])
    try:
        return builder.tsa_certificate(leaf).build().verify_message(response, signature)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # beside its own error, whatever the certificates in the response make the parsers raise
        return False
