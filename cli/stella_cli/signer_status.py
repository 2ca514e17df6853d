"""`stella signer status`: which key signs, what waits for the log, and what went wrong last."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import click

from stella_cli import gateway
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, TryAgain

_SHOWN: Final = (
    ("mode", "mode"),
    ("key", "key_id"),
    ("key uri", "uri"),
    ("identity", "identity"),
    ("issuer", "issuer"),
    ("last certificate until", "last_certificate_not_after"),
    ("waiting for", "waiting_for"),
    ("certificate authority", "certificate_authority"),
    ("timestamp authorities", "timestamp_authorities"),
    ("log", "log"),
    ("trusted root", "trusted_root_sha256"),
)
_QUEUE: Final = (
    ("pending", "pending"),
    ("logged since start", "logged"),
    ("newest logged chunk", "last_logged"),
    ("failures since start", "failures"),
    ("rejected by the log", "rejected"),
)


def run(settings: Settings, *, as_json: bool) -> None:
    """Print what the signer says of itself.  Raises `BadAnswer` when it cannot sign or submit."""
    body = gateway.get(settings, "/status").json()
    signers = [s for s in body.get("services", []) if s.get("service") == "signer"]
    if not signers:
        raise TryAgain("no signer has been heard of yet", hint="stella signals status shows what runs")
    signer = signers[0]
    detail: dict[str, Any] = signer.get("detail") or {}
    signing: dict[str, Any] = detail.get("signing") or {}
    if as_json:
        click.echo(json.dumps({"state": signer.get("state"), "reason": signer.get("reason"), **signing}))
    else:
        _text(signer, detail, signing)
    if signer.get("state") == "failed" or signing.get("alarm"):
        raise BadAnswer(
            str(signing.get("alarm") or signer.get("reason")),
            hint="stella signals status --verbose shows more",
            runbook="issue-rekor-submission-failures",
        )


def _text(signer: dict[str, Any], detail: dict[str, Any], signing: dict[str, Any]) -> None:
    rows = [("state", f"{signer.get('state')}  {signer.get('reason') or ''}".rstrip())]
    rows += [(name, str(signing[key])) for name, key in _SHOWN if signing.get(key)]
    rows.append(("chain", f"{detail.get('chain_id')}, open chunk {detail.get('index')}"))
    if signing.get("submit_to_rekor"):
        rows += [(name, str(signing.get(key, 0))) for name, key in _QUEUE]
        if error := signing.get("last_submission_error"):
            rows.append(("last error", f"Failed to submit to Rekor: {error}"))
    else:
        rows.append(("submission", "off (signals.signing.submit_to_rekor)"))
    if error := signing.get("sign_error") or detail.get("last_error"):
        rows.append(("last error", str(error)))
    age = time.time() - float(signer.get("at") or time.time())
    if age > 5:
        rows.append(("told", f"{age:.0f} s ago"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
