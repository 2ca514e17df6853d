"""Asking the node's gateway over HTTP, and saying well why it does not answer.  The one HTTP client here."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from stella_cli import node_file
from stella_cli.settings import Settings
from stella_shared.errors import NotFound, NotPermitted, StellaError, TryAgain, UsageError

TIMEOUT_SECONDS: Final = 3.0
_ANSWER_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Answer:
    """An HTTP status and its body."""

    code: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object.  Raises `UsageError` when it is none: somebody else answered."""
        with contextlib.suppress(ValueError):
            value = json.loads(self.body)
            if isinstance(value, dict) and "node" in value:
                return value
        raise UsageError(
            "what answers on the gateway's port is no Stella gateway",
            hint="Prometheus itself uses port 9090 too: choose another with signals.metrics.port",
            runbook="configuration-reference",
        )


def running_node(settings: Settings) -> node_file.NodeFile | None:
    """Return the running node as its file tells; None when there is none, or its state is not ours to see."""
    with contextlib.suppress(NotPermitted):
        return node_file.running(settings.state)
    return None


def url(settings: Settings) -> str:
    """Return the gateway's URL as the running node has it, else as the configuration says."""
    node = running_node(settings)
    if node is not None and node.gateway_url:
        return _reachable(node.gateway_url)
    metrics = settings.signals.metrics
    host = f"[{metrics.address}]" if ":" in metrics.address else metrics.address
    return _reachable(f"http://{host}:{metrics.port}")


def _reachable(address: str) -> str:
    # Who listens on every address is asked over loopback.
    return address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def get(settings: Settings, path: str) -> Answer:
    """Return the gateway's answer.  Raises `NotFound` when no node runs, `TryAgain` when one does."""
    base = url(settings)
    request = urllib.request.Request(base + path)  # noqa: S310  # made here, always http
    with contextlib.suppress(OSError):
        if settings.signals.metrics.token_file:
            token = Path(settings.signals.metrics.token_file).read_text(encoding="ascii").strip()
            request.add_header("Authorization", f"Bearer {token}")
    # The node is asked directly: a proxy from the environment would see its answers.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            return Answer(response.status, response.read(_ANSWER_BYTES))
    except urllib.error.HTTPError as e:
        with e:
            body = e.read(_ANSWER_BYTES)
        if e.code == 401:
            raise NotPermitted(
                f"the gateway at {base} wants a token",
                hint="run as a user who may read signals.metrics.token_file",
            ) from None
        return Answer(e.code, body)
    except (OSError, ValueError) as e:
        raise _silent(settings, base, getattr(e, "reason", e)) from None


def _silent(settings: Settings, base: str, reason: object) -> StellaError:
    node = running_node(settings)
    if node is None:
        return NotFound(
            f"no node answers at {base}: {reason}",
            hint="start one: sudo stella signals start; one that runs is found by its --config and --target",
            runbook="health-checks",
        )
    if not node.gateway_url:
        return UsageError(
            f"the node runs (pid {node.who.pid}), but without a gateway: there is nobody to ask",
            hint="set signals.metrics.enabled to true and start it again",
        )
    return TryAgain(
        f"the node runs (pid {node.who.pid}), but its gateway at {base} does not answer: {reason}",
        hint=f"its log is {settings.state / 'logs' / 'gateway.log'}",
        runbook="health-checks",
    )
