"""What was watched, and how: the coverage document that goes into the evidence.

It is canonical JSON, the same bytes as long as nothing changed.  What did *not* happen can only be believed
where coverage says that it would have been seen.
"""

from __future__ import annotations

import os

import msgspec

from stella_collector.binaries.file_probes import BinaryState
from stella_collector.probes import ProbeState
from stella_collector.targets import Target
from stella_shared.config import Signals

_encoder = msgspec.json.Encoder(order="sorted")


class ProbeCoverage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One probe: attached where, or why not."""

    name: str
    attached: bool
    attach_point: str
    scope: str
    reason: str = ""


class Btf(msgspec.Struct, frozen=True):
    """The type information the programs were relocated against."""

    source: str
    sha256: str


class Coverage(msgspec.Struct, frozen=True):
    """The coverage document.  `targets` that have no id yet are not there."""

    arch: str
    binaries: list[BinaryState]
    bpf_object_sha256: str
    btf: Btf
    collector_version: str
    config_sha256: str
    filters: dict[str, list[str]]
    #: What targets have asked for through io_uring, past the probes: `ring`, `open`, `connect`, `accept`; `unknown`.
    io_uring: list[str]
    kernel_release: str
    libbpf: str
    libraries: list[str]
    max_events_per_second: int
    max_events_per_second_per_container: int
    probes: list[ProbeCoverage]
    reader: str
    ring_buffer_bytes: int
    stand_in: str
    targets: list[Target]


def document(
    signals: Signals,
    *,
    states: list[ProbeState],
    targets: list[Target],
    libraries: list[str],
    bpf_object_sha256: str,
    btf_sha256: str,
    config_sha256: str,
    libbpf: str,
    reader: str,
    version: str,
    stand_in: str = "",
    binaries: list[BinaryState] | None = None,
    uring: dict[str, int] | None = None,
) -> bytes:
    """Return the canonical bytes.  `stand_in` names what replaced a real kernel (the demo), else ""."""
    kernel = os.uname()
    filters = signals.filters
    return _encoder.encode(
        Coverage(
            arch=kernel.machine,
            binaries=binaries or [],
            bpf_object_sha256=bpf_object_sha256,
            btf=Btf("kernel", btf_sha256),
            collector_version=version,
            config_sha256=config_sha256,
            filters={
                "networks_allow": list(filters.networks.allowlist),
                "networks_deny": list(filters.networks.denylist),
                "paths_allow": list(filters.paths.allowlist),
                "paths_deny": list(filters.paths.denylist),
            },
            io_uring=sorted(what for what, count in uring.items() if count) if uring else ["unknown"],
            kernel_release=kernel.release,
            libbpf=libbpf,
            libraries=sorted(libraries),
            max_events_per_second=signals.max_events_per_second,
            max_events_per_second_per_container=signals.max_events_per_second_per_container,
            probes=[
                ProbeCoverage(s.name, True, s.attach_point, s.scope)
                if s.attached
                else ProbeCoverage(s.name, False, s.attach_point, "", s.reason)
                for s in states
            ],
            reader=reader,
            ring_buffer_bytes=signals.ring_buffer_size,
            stand_in=stand_in,
            targets=targets,
        )
    )
