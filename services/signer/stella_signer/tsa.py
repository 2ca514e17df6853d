"""RFC 3161 timestamps over a signature, from the configured authorities; a reply is checked before it is kept."""

from __future__ import annotations

from rfc3161_client import TimestampRequestBuilder
from rfc3161_client.base import HashAlgorithm

from stella_shared.evidence.transparency import timestamp
from stella_shared.evidence.transparency.trust import TrustRoot
from stella_signer.outside import Frozen, Later, Outside, Refused
from stella_signer.trust_config import Services

_QUERY = "application/timestamp-query"


async def stamp(outside: Outside, services: Services, signature: bytes) -> list[bytes]:
    """Return the TimeStampResp (DER) of as many authorities as are wanted, in their order.

    Nonce, imprint and the authority's signature are checked.  Raises `Later` when too few answer as they should.
    """
    found: list[bytes] = []
    failed = Later("the signing config names no timestamp authority that is valid now")
    for url in services.tsas:
        if len(found) == services.tsas_wanted:
            break
        try:
            found.append(await _ask(outside, url, signature, services.root))
        except Later as e:
            failed = Later(f"timestamp authority {url}: {e}", e.after_seconds)
        except (Refused, Frozen) as e:
            # A timestamp authority has no opinion of what it stamps: a refusal is its own trouble, and passes.
            failed = Later(f"timestamp authority {url}: {e}")
    if len(found) < max(1, services.tsas_wanted):
        raise failed
    return found


async def _ask(outside: Outside, url: str, signature: bytes, root: TrustRoot) -> bytes:
    request = TimestampRequestBuilder().hash_algorithm(HashAlgorithm.SHA256).data(signature).nonce(nonce=True).build()
    answer = await outside.post(url, request.as_bytes(), _QUERY)
    try:
        if timestamp.parse(answer.body).tst_info.nonce != request.nonce:
            raise ValueError("its reply is to another question (nonce)")
        timestamp.check(answer.body, signature, root)
    except ValueError as e:
        raise Later(str(e)) from None
    return answer.body
