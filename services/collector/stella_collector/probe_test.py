"""`--test-probes`: what would attach here, and what keeps the rest from it.

Loads and attaches everything for a moment, with a scope in which nothing is watched: no event is recorded.
"""

from __future__ import annotations

import msgspec

from stella_collector.kernel import Kernel, probes_of
from stella_collector.libbpf import Libbpf
from stella_shared.config import Signals
from stella_shared.errors import StellaError


class ProbeResult(msgspec.Struct, frozen=True):
    """One row of `stella signals test-probes`."""

    probe: str
    attach_point: str
    kernel: bool
    permission: bool
    attached: bool
    reason: str
    fix: str


def run(signals: Signals) -> list[ProbeResult]:
    """Try every probe; never raises for what the kernel refuses."""
    try:
        with Kernel(signals, Libbpf(), watch_nothing=True) as kernel:
            kernel.attach()
            kernel.attach_libraries_of_node()
            return [
                ProbeResult(s.name, s.attach_point, s.kernel, s.permission, s.attached, s.reason, s.fix)
                for s in kernel.states
            ]
    except StellaError as e:
        refused = e.exit_code == 3
        return [
            ProbeResult(p.name, p.attach_point(), e.exit_code != 4, not refused, False, str(e), e.hint)
            for p, _ in probes_of(signals)
        ]
