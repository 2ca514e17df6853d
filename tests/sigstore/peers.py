"""Independent verdicts on bundles, by implementations that nobody here wrote.

`@sigstore/verify` judges bundles with a managed key and with a certificate; sigstore-python those with a certificate.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from sigstore.models import Bundle, ClientTrustConfig
from sigstore.verify import Verifier, policy

from tests.sigstore.trust import client_trust_config, signing_config


class Verdict(NamedTuple):
    """Whether a peer accepts a bundle, and why not."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Check:
    """One bundle to judge.

    `keys` maps hints to PEM for a bundle with a managed key, None for one with a certificate.
    `artifact` is wanted for a bundle that signs no envelope but a message.
    `identity`, without which everybody is taken, is the whole name in the certificate.
    `tlogs` and `timestamps` are how many entries, and times that are signed by others, there must be.
    """

    bundle: Mapping[str, Any]
    keys: Mapping[str, str] | None = None
    artifact: bytes | None = None
    identity: str | None = None
    tlogs: int = 1
    timestamps: int = 1


def key_hints(*pems: bytes) -> dict[str, str]:
    """Return the map of `Check.keys`, with the hint that cosign uses: base64 of SHA-256 of SPKI."""
    hints = {}
    for pem in pems:
        spki = load_pem_public_key(pem).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        hints[base64.b64encode(hashlib.sha256(spki).digest()).decode()] = pem.decode()
    return hints


def judge_js(root: Mapping[str, Any], checks: Sequence[Check]) -> list[Verdict]:
    """Return the verdicts of `@sigstore/verify`, in order; one start of node for all of them."""
    question = {
        "trustedRoot": root,
        "checks": [
            {
                "bundle": check.bundle,
                "keys": check.keys,
                "artifact": None if check.artifact is None else base64.b64encode(check.artifact).decode(),
                # It takes a pattern.
                "identity": None if check.identity is None else f"^{re.escape(check.identity)}$",
                "tlogs": check.tlogs,
                "timestamps": check.timestamps,
            }
            for check in checks
        ],
    }
    done = subprocess.run(
        ["node", "verify.mjs"],
        cwd=Path(__file__).parent, input=json.dumps(question), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Verdict(one["ok"], one["reason"]) for one in json.loads(done.stdout)]


def judge_python(root: Mapping[str, Any], bundle: Mapping[str, Any], *, identity: str, issuer: str) -> Verdict:
    """Return the verdict of sigstore-python on a bundle with a certificate and an envelope."""
    try:
        config = ClientTrustConfig.from_json(json.dumps(client_trust_config(dict(root), signing_config())))
        wanted = policy.Identity(identity=identity, issuer=issuer)
        Verifier(trusted_root=config.trusted_root).verify_dsse(Bundle.from_json(json.dumps(bundle)), wanted)
    # A malformed entry makes it raise more than its own errors; whatever it raises, it does not accept.
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}")
    return Verdict(True, "")
