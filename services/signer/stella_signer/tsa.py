"""RFC 3161 timestamps over a signature, from each configured authority; the reply is checked before it is kept."""

from __future__ import annotations

from rfc3161_client import TimestampRequestBuilder
from rfc3161_client.base import HashAlgorithm

from stella_shared.evidence.transparency import timestamp
from stella_shared.evidence.transparency.trust import TrustRoot
from stella_signer.outside import Frozen, Later, Outside, Refused

_QUERY = "application/timestamp-query"


async def stamp(outside: Outside, urls: list[str], signature: bytes, root: TrustRoot) -> list[bytes]:
    """Return the TimeStampResp (DER) of each authority that answers, at least one.

    Nonce, imprint and the authority's signature are checked.  Raises `Later` when none answers as it should.
    """
    found: list[bytes] = []
    failed: Later | None = None
    for url in urls:
        try:
            found.append(await _ask(outside, url, signature, root))
        except Later as e:
            failed = e
        except (Refused, Frozen) as e:
            # A timestamp authority has no opinion of what it stamps: a refusal is its own trouble, and passes.
            failed = Later(f"timestamp authority {url}: {e}")
    if not found and failed is not None:
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
        raise Later(f"timestamp authority {url}: {e}") from None
    return answer.body
