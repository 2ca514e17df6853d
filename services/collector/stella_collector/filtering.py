"""What the kernel side is told to record: filters and limits, as its maps hold them; written once more by a reload.

New prefixes and networks are added before the switches that make them count, old ones are taken away after: so
while a reload is under way an event is judged by the old lists, the new ones, or both together.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from typing import Final

from stella_collector import targets
from stella_collector.objects import Maps
from stella_shared.config import Signals
from stella_shared.kernel_records import TYPE_NAMES
from stella_shared.patterns import compile_paths

#: struct stella_config.
CONFIG: Final = struct.Struct("<6I2Q2I")
TARGET_NAMES: Final = "stella_target_names"
WINDOWS_PER_SECOND: Final = 10
PATH_KEY_BYTES: Final = 252
_KEY_BYTES: Final = {
    "path_allow": 4 + PATH_KEY_BYTES,
    "path_deny": 4 + PATH_KEY_BYTES,
    "network_allow": 20,
    "network_deny": 20,
    TARGET_NAMES: 16,
}
_TYPES: Final = {name: number for number, name in TYPE_NAMES.items()}


class Filtering:
    """The filter maps of a loaded object."""

    def __init__(self, obj: Maps) -> None:
        self._object = obj
        #: What is in the maps, of a former collector too.
        self._written = {name: set(obj.keys(name, size)) for name, size in _KEY_BYTES.items()}
        #: Names of target containers: those of the configuration, and those that its selectors match now.
        self._asked: set[bytes] = set()
        self._selected: set[bytes] = set()

    def apply(self, signals: Signals, *, scoped: bool) -> None:
        """Make the programs record by this configuration.  `scoped`: targets alone are recorded."""
        paths = compile_paths(signals.filters.paths.allowlist, signals.filters.paths.denylist, PATH_KEY_BYTES)
        networks = signals.filters.networks
        self._asked = targets.name_keys(signals.filters.target_containers)
        wanted = {
            "path_allow": set() if paths.allow_all else {_path_key(prefix) for prefix in paths.allow_prefixes},
            "path_deny": {_path_key(prefix) for prefix in paths.deny_prefixes},
            "network_allow": {_address_key(network) for network in networks.allowlist},
            "network_deny": {_address_key(network) for network in networks.denylist},
            TARGET_NAMES: self._asked | self._selected,
        }
        for name, keys in wanted.items():
            for key in keys - self._written[name]:
                self._object.update(name, key, b"\1")
        config = CONFIG.pack(
            scoped,
            not paths.allow_all,
            bool(paths.deny_prefixes),
            bool(networks.allowlist),
            bool(networks.denylist),
            signals.probes.kernel_paths == "always",
            _per_window(signals.max_events_per_second),
            _per_window(signals.max_events_per_second_per_container),
            targets.v1_hierarchy(),
            sum(1 << _TYPES[name] for name in signals.probes.stacks),
        )
        self._object.update(".data.config", struct.pack("<I", 0), config)
        for name, keys in wanted.items():
            for key in self._written[name] - keys:
                self._object.delete(name, key)
        self._written = wanted

    def name(self, containers: Iterable[str]) -> None:
        """Have the cgroups of these containers, which selectors match, watched from when they are made."""
        self._selected = targets.name_keys(containers)
        wanted, written = self._asked | self._selected, self._written[TARGET_NAMES]
        for key in wanted - written:
            self._object.update(TARGET_NAMES, key, b"\1")
        for key in written - wanted:
            self._object.delete(TARGET_NAMES, key)
        self._written[TARGET_NAMES] = wanted


def _per_window(per_second: int) -> int:
    return -(-per_second // WINDOWS_PER_SECOND)


def _address_key(network: str) -> bytes:
    parsed = ipaddress.ip_network(network, strict=False)
    if parsed.version == 4:
        return struct.pack("<I", 96 + parsed.prefixlen) + b"\0" * 10 + b"\xff\xff" + parsed.network_address.packed
    return struct.pack("<I", parsed.prefixlen) + parsed.network_address.packed


def _path_key(prefix: bytes) -> bytes:
    return struct.pack("<I", len(prefix) * 8) + prefix.ljust(PATH_KEY_BYTES, b"\0")
