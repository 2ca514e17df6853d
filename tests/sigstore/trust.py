"""Puts trusted_root.json, signing_config.v0.2.json and their union together, out of the parts that a test runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TRUSTED_ROOT = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
SIGNING_CONFIG = "application/vnd.dev.sigstore.signingconfig.v0.2+json"
CLIENT_TRUST_CONFIG = "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json"
LONG_AGO = "2020-01-01T00:00:00Z"


def trusted_root(
    *,
    tlogs: Sequence[dict[str, Any]] = (),
    tsas: Sequence[dict[str, Any]] = (),
    authorities: Sequence[dict[str, Any]] = (),
    ctlogs: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return a trusted_root.json of `LogStandin.trusted_root_tlogs`, `Tsa.trusted_root_tsa` and Fulcio's parts."""
    return {
        "mediaType": TRUSTED_ROOT,
        "tlogs": list(tlogs),
        "certificateAuthorities": list(authorities),
        "ctlogs": list(ctlogs),
        "timestampAuthorities": list(tsas),
    }


def service(
    url: str, version: int = 1, operator: str = "test", start: str = LONG_AGO, end: str | None = None
) -> dict[str, Any]:
    """Return one service of a signing config; `version` is its API's major version."""
    valid_for = {"start": start} if end is None else {"start": start, "end": end}
    return {"url": url, "majorApiVersion": version, "validFor": valid_for, "operator": operator}


def signing_config(
    *,
    rekor: Sequence[dict[str, Any]] = (),
    tsas: Sequence[dict[str, Any]] = (),
    fulcio: Sequence[dict[str, Any]] = (),
    oidc: Sequence[dict[str, Any]] = (),
    selector: str = "ANY",
    count: int | None = None,
) -> dict[str, Any]:
    """Return a signing_config.v0.2.json of services; `selector` and `count` say how many logs and authorities to use.

    It has no place for where a v2 log is read: that is `LogStandin.read_url`, which the signer is told apart.
    """
    choice: dict[str, Any] = {"selector": selector} if count is None else {"selector": selector, "count": count}
    return {
        "mediaType": SIGNING_CONFIG,
        "caUrls": list(fulcio),
        "oidcUrls": list(oidc),
        "rekorTlogUrls": list(rekor),
        "rekorTlogConfig": choice,
        "tsaUrls": list(tsas),
        "tsaConfig": choice,
    }


def client_trust_config(root: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return both in one document, as Sigstore's clients take them."""
    return {"mediaType": CLIENT_TRUST_CONFIG, "trustedRoot": root, "signingConfig": config}
