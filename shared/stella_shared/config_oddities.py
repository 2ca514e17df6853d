"""What a valid configuration may hold that its author hardly meant.

Each check looks at the whole configuration and returns (key, words) pairs.  Nothing here is a fault: `config.load`
refuses those.  Files that keys name are looked at, never opened.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from stella_shared import patterns
from stella_shared.config import Signals, bus_url, declared

_PASSING: Final = ("/tmp/", "/var/tmp/", "/dev/shm/", "/run/")  # noqa: S108  # named, not used
_SMALL_RING: Final = 128 << 10
#: Keys whose files hold a secret.
_SECRET_FILES: Final = (
    "signals.metrics.token_file",
    "signals.bus.credentials_file",
    "signals.signing.pin_file",
    "signals.signing.identity_token_file",
)


class Oddity(msgspec.Struct, frozen=True):
    """A key and what is odd about its value."""

    key: str
    message: str


def oddities(signals: Signals) -> list[Oddity]:
    """Return what is allowed and odd, in the order of the keys."""
    order = {field.key: number for number, field in enumerate(declared())}
    checks = (_watching, _places, _files, _reach, _repetitions)
    found = [Oddity(key, message) for check in checks for key, message in check(signals)]
    return sorted(found, key=lambda oddity: order[oddity.key])


def _watching(signals: Signals) -> Iterator[tuple[str, str]]:
    """Look at what would be watched, or lost."""
    probes = signals.probes
    switches = [name for name in probes.__struct_fields__ if isinstance(getattr(probes, name), bool)]
    if not any(getattr(probes, name) for name in switches):
        yield f"signals.probes.{switches[0]}", "every probe is switched off: nothing would be recorded"
    filters = signals.filters
    denied = [patterns.split(text) for text in filters.paths.denylist]
    for text in filters.paths.allowlist:
        if patterns.split(text) in denied or any(_below(text, other) for other in filters.paths.denylist):
            yield "signals.filters.paths.allowlist", f"{text} is denied too, and deny wins: it is never recorded"
    networks = filters.networks
    for text in networks.allowlist:
        if any(_inside(text, other) for other in networks.denylist):
            yield "signals.filters.networks.allowlist", f"{text} is denied too, and deny wins: it is never recorded"
    if signals.ring_buffer_size < _SMALL_RING:
        size = signals.ring_buffer_size
        yield "signals.ring_buffer_size", f"{size} bytes hold some {size // 150} events: a burst is lost"
    for name in ("max_events_per_second", "max_events_per_second_per_container"):
        if getattr(signals, name):
            yield f"signals.{name}", "what is above the limit is lost, and counted as rate_limit"
    if not signals.redaction.enabled:
        yield "signals.redaction.enabled", "secrets in arguments go into the evidence as they are, for ever"
    if not signals.signing.enabled:
        yield "signals.signing.enabled", "nothing is signed: the evidence proves nothing to anybody"
    if signals.enrichers > 2 * (os.cpu_count() or 1):
        yield "signals.enrichers", f"{signals.enrichers} processes on {os.cpu_count()} CPUs"


def _places(signals: Signals) -> Iterator[tuple[str, str]]:
    for key, text in (
        ("signals.output_directory", signals.output_directory),
        ("signals.state_directory", signals.state_directory),
    ):
        if text.startswith(_PASSING):
            what = "the evidence" if key.endswith("output_directory") else "the signing key"
            yield key, f"{text} may be emptied at a restart, and {what} with it"


def _files(signals: Signals) -> Iterator[tuple[str, str]]:
    """Look whether files that are named are there, and whether secrets are read by their owner alone."""
    for field in declared():
        value: object = signals
        for name in field.key.split(".")[1:]:
            value = getattr(value, name)
        if not isinstance(value, str) or not value.startswith("/") or value == field.default:
            continue
        if not field.key.endswith(("_file", "_config", "_root", "_module", "_socket")):
            continue
        try:
            mode = Path(value).stat().st_mode
        except FileNotFoundError:
            yield field.key, f"there is no file {value}"
            continue
        except OSError as e:
            yield field.key, f"{value}: {(e.strerror or str(e)).lower()}"
            continue
        if field.key in _SECRET_FILES and stat.S_IMODE(mode) & 0o077:
            yield field.key, f"{value} holds a secret and others than its owner may use it (mode {mode & 0o777:04o})"


def _reach(signals: Signals) -> Iterator[tuple[str, str]]:
    """Look at what is reached over a network."""
    metrics = signals.metrics
    if metrics.enabled and not _loopback(metrics.address) and not metrics.token_file:
        yield "signals.metrics.address", "beyond loopback the gateway starts only with signals.metrics.token_file"
    for url in bus_url(signals).split(","):
        parts = urlsplit(url.strip())
        if parts.scheme == "nats" and not _loopback(parts.hostname or ""):
            yield "signals.bus.url", f"{url} carries events and passwords in clear over the network: use tls://"


def _repetitions(signals: Signals) -> Iterator[tuple[str, str]]:
    for field in declared():
        value: object = signals
        for name in field.key.split(".")[1:]:
            value = getattr(value, name)
        if isinstance(value, list):
            for item in sorted({item for item in value if value.count(item) > 1}):
                yield field.key, f"{item} stands there {value.count(item)} times"


def _below(text: str, other: str) -> bool:
    """Return whether everything that `text` matches lies under `other`, as far as that is plain: `other/**`."""
    return other.endswith("/**") and (text + "/").startswith(other.removesuffix("**"))


def _inside(text: str, other: str) -> bool:
    one, two = ipaddress.ip_network(text), ipaddress.ip_network(other)
    return one.version == two.version and one.subnet_of(two)  # type: ignore[arg-type]


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
