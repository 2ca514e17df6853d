"""What the values of single configuration keys must be, beyond type and range.

Each check takes the value of its key and returns the faults in words that follow the key's name, [] when
good.  `CHECKS` says which check belongs to which key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from stella_shared import expressions, patterns, selectors
from stella_shared.config_layers import shown
from stella_shared.symbols import is_build_id

_CONTAINER = re.compile(r"(?:[a-z-]+://)?[0-9a-f]{12,64}")
_KMS = re.compile(r"[a-z][a-z0-9]{1,15}:[^\s]*")
_NAMESPACE = re.compile(r"(?:pid|mnt|net):\[[0-9]{1,10}\]")


def _page_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def _ring_faults(size: int) -> list[str]:
    """Check the kernel's rule for BPF_MAP_TYPE_RINGBUF: a power of two and a multiple of the page size."""
    page = _page_bytes()
    if size & (size - 1) == 0 and size % page == 0:
        return []
    below = 1 << (size.bit_length() - 1)
    near = [n for n in (below, below * 2) if page <= n <= 1 << 30] or [page]
    return [
        f"is {size}; allowed: a power of two and a multiple of the page size ({page}); "
        f"nearest: {' or '.join(map(str, near))}"
    ]


def _folder_faults(text: str) -> list[str]:
    """Check a path that we write below."""
    path = PurePosixPath(text)
    if not path.is_absolute() or "\0" in text or ".." in path.parts:
        return [f"is {shown(text)}; allowed: an absolute path without .."]
    return ["is /; allowed: a folder of its own"] if path == PurePosixPath("/") else []


def _optional_folder_faults(text: str) -> list[str]:
    return _folder_faults(text) if text else []


def _optional_file_faults(text: str) -> list[str]:
    ok = not text or (text.startswith("/") and "\0" not in text and not text.endswith("/"))
    return [] if ok else [f"is {shown(text)}; allowed: an absolute path of a file, or empty"]


def _files_faults(items: list[str]) -> list[str]:
    return [f"has {shown(t)}; allowed: absolute paths of files" for t in items if _optional_file_faults(t)]


def _that_parse(parse: Callable[[str], object]) -> Callable[[list[str]], list[str]]:
    """Return a check of lists whose items `parse` takes; it raises `ValueError` with what is wrong."""

    def faults(items: list[str]) -> list[str]:
        found: list[str] = []
        for item in items:
            try:
                parse(item)
            except ValueError as e:
                found.append(f"has {shown(item)}: {e}")
        return found

    return faults


def _programs_faults(items: list[str]) -> list[str]:
    return [f"has {shown(t)}; allowed: file names without a folder" for t in items if "/" in t or "\0" in t]


def _networks_faults(items: list[str]) -> list[str]:
    return [f"has {shown(item)}{fault}" for item in items if (fault := _network_fault(item))]


def _network_fault(item: str) -> str:
    for strict in (True, False):
        try:
            network = ip_network(item, strict)
        except ValueError:
            continue
        return "" if strict else f": bits are set beyond the prefix; did you mean {network}?"
    return "; allowed: CIDR such as 10.0.0.0/8 or fd00::/8, or a single address"


def _functions_faults(items: list[Any]) -> list[str]:
    return [f"[{index}].{fault}" for index, item in enumerate(items) for fault in _watched_faults(item)]


def _watched_faults(item: Any) -> list[str]:
    found: list[str] = []
    if item.binary.startswith("build-id:"):
        if not is_build_id(item.binary.removeprefix("build-id:")):
            found.append(f"binary is {shown(item.binary)}; allowed: build-id: and 1 to 32 bytes in lower-case hex")
    else:
        try:
            patterns.split(item.binary)
        except ValueError as e:
            found.append(f"binary is {shown(item.binary)}: {e}")
    found += [
        f"functions has {shown(name)}; allowed: printable text" for name in item.functions if not name.isprintable()
    ]
    if item.image and not (item.image.isprintable() and selectors.is_selector(selectors.of_image(item.image))):
        found.append(f"image is {shown(item.image)}; allowed: printable text such as */nginx:*, without a scheme")
    return found


def _containers_faults(items: list[str]) -> list[str]:
    allowed = (
        "container ids of 12 to 64 hex digits, as `docker ps --no-trunc` shows them, or name:…, image:…, label:…=…"
    )
    ids = [item for item in items if not selectors.is_selector(item)]
    faults = [f"has {shown(t)}; allowed: {allowed}" for t in ids if not _CONTAINER.fullmatch(t)]
    return faults + _that_parse(selectors.parse)([item for item in items if item not in ids])


def _socket_faults(text: str) -> list[str]:
    if text == "auto" or not _optional_file_faults(text):
        return []
    return [f"is {shown(text)}; allowed: auto, an absolute path of a socket, or empty"]


def _namespaces_faults(items: list[str]) -> list[str]:
    allowed = "pid:[4026531836], mnt:[…] or net:[…], as `readlink /proc/PID/ns/pid` shows it"
    return [f"has {shown(t)}; allowed: {allowed}" for t in items if not _NAMESPACE.fullmatch(t)]


def _cgroups_faults(items: list[str]) -> list[str]:
    return [
        f"has {shown(t)}; allowed: paths under /sys/fs/cgroup that begin with / and have no .."
        for t in items
        if not t.startswith("/") or "\0" in t or ".." in t.split("/")
    ]


def _address_faults(text: str) -> list[str]:
    try:
        ip_address("127.0.0.1" if text == "localhost" else text)
    except ValueError:
        return [f"is {shown(text)}; allowed: an IP address or localhost"]
    return []


def _node_faults(text: str) -> list[str]:
    return [] if text.isprintable() else [f"is {shown(text)}; allowed: printable text"]


def _url_faults(text: str) -> list[str]:
    for url in text.split(",") if text else []:
        try:
            parts = urlsplit(url.strip())
            ok = parts.scheme in ("nats", "tls") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            ok = False
        if not ok:
            return [f"is {shown(text)}; allowed: nats://host:port or tls://host:port"]
        if parts.username is not None or parts.password is not None:
            return ["carries a user or password; put them into signals.bus.credentials_file"]
    return []


def _key_faults(text: str) -> list[str]:
    ok = text in ("local", "fulcio") or _KMS.fullmatch(text)
    return [] if ok else [f"is {shown(text)}; allowed: local, fulcio, or a KMS URI such as awskms:… or hsm:…"]


def _http_faults(text: str) -> list[str]:
    try:
        parts = urlsplit(text)
        ok = not text or (parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0)
    except ValueError:
        ok = False
    return [] if ok else [f"is {shown(text)}; allowed: http://… or https://…"]


def _https_faults(items: list[str]) -> list[str]:
    return [f"has one that {fault}" for item in items for fault in _http_faults(item)]


def _folders_faults(items: list[str]) -> list[str]:
    return [f"has one that {fault}" for item in items for fault in _folder_faults(item)]


CHECKS: Final[dict[str, Callable[[Any], list[str]]]] = {
    "signals.output_directory": _folder_faults,
    "signals.state_directory": _optional_folder_faults,
    "signals.ring_buffer_size": _ring_faults,
    "signals.node": _node_faults,
    "signals.probes.openssl_libraries": _files_faults,
    "signals.probes.functions": _functions_faults,
    "signals.filters.target_containers": _containers_faults,
    "signals.filters.target_namespaces": _namespaces_faults,
    "signals.filters.target_cgroups": _cgroups_faults,
    "signals.filters.paths.allowlist": _that_parse(patterns.split),
    "signals.filters.paths.denylist": _that_parse(patterns.split),
    "signals.filters.networks.allowlist": _networks_faults,
    "signals.filters.networks.denylist": _networks_faults,
    "signals.signing.key_id": _key_faults,
    "signals.signing.identity_token_file": _optional_file_faults,
    "signals.signing.pin_file": _optional_file_faults,
    "signals.signing.pkcs11_module": _optional_file_faults,
    "signals.rekor.trust_config": _optional_file_faults,
    "signals.rekor.trusted_root": _optional_file_faults,
    "signals.rekor.signing_config": _optional_file_faults,
    "signals.rekor.tuf_url": _http_faults,
    "signals.rekor.tuf_root": _optional_file_faults,
    "signals.rekor.read_url": _http_faults,
    "signals.symbols.debug_directories": _folders_faults,
    "signals.symbols.debuginfod_urls": _https_faults,
    "signals.metrics.address": _address_faults,
    "signals.metrics.token_file": _optional_file_faults,
    "signals.bus.url": _url_faults,
    "signals.bus.credentials_file": _optional_file_faults,
    "signals.bus.tls.ca_file": _optional_file_faults,
    "signals.bus.tls.cert_file": _optional_file_faults,
    "signals.bus.tls.key_file": _optional_file_faults,
    "signals.runtimes.docker_socket": _socket_faults,
    "signals.runtimes.podman_socket": _socket_faults,
    "signals.runtimes.containerd_socket": _socket_faults,
    "signals.runtimes.cri_socket": _socket_faults,
    "signals.redaction.patterns": _that_parse(expressions.compile_pattern),
    "signals.redaction.keep": _programs_faults,
}
