"""What a changed configuration means for a running node: which keys changed, and who must take them up.  Pure."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stella_shared.config import Signals
from stella_shared.errors import ConfigError

#: Which parts take a key up, by the begin of its name; the longest that fits counts.  Keys that are not here hold
#: for the life of a node: where its evidence is, who it is, which probes and how large a ring it has.
TAKERS: Final[dict[str, tuple[str, ...]]] = {
    "filters": ("collector", "enricher"),
    "filters.networks": ("collector",),
    "filters.target_cgroups": ("collector",),
    "filters.target_namespaces": ("collector",),
    "max_events_per_second": ("collector",),
    "max_events_per_second_per_container": ("collector",),
    "resources": ("enricher",),
    "redaction": ("enricher",),
    "symbols": ("enricher",),
    "runtimes": ("enricher",),
    "rotation": ("signer",),
    "rekor": ("signer",),
    "signing.submit_to_rekor": ("signer",),
    "signing.identity_token_file": ("signer",),
    "metrics.token_file": ("gateway",),
    "logging": ("collector", "enricher", "signer", "gateway"),
}
#: In this order: the collector can refuse, the others follow.
ORDER: Final = ("collector", "enricher", "signer", "gateway")


def changed(old: Signals, new: Signals) -> list[str]:
    """Return the dotted keys, below `signals`, whose values differ."""
    return _differences(msgspec.to_builtins(old), msgspec.to_builtins(new), "")


def takers(keys: list[str]) -> list[str]:
    """Return the parts that must take these keys up.  Raises `ConfigError` naming each that no running node can."""
    fixed = [key for key in keys if not _takers_of(key)]
    if fixed:
        raise ConfigError(
            "\n".join(f"signals.{key} cannot be changed while the node runs" for key in fixed),
            hint="nothing was changed; set it back, or stop and start the node",
            runbook="procedure-change-the-configuration",
        )
    wanted = {part for key in keys for part in _takers_of(key)}
    return [part for part in ORDER if part in wanted]


def _takers_of(key: str) -> tuple[str, ...]:
    while key:
        if key in TAKERS:
            return TAKERS[key]
        key = key.rpartition(".")[0]
    return ()


def _differences(old: Any, new: Any, at: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for key in sorted(old.keys() | new.keys())
            for found in _differences(old.get(key), new.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if old == new else [at]
