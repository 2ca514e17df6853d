"""`--test-probes`: what would attach here, what it costs, and what keeps the rest from it.

Loads and attaches everything for a moment, with a scope in which nothing is watched but a workload of our own: no
event is kept.  Filters of paths and networks are left out, so that the cost is that of an event that is recorded.
"""

from __future__ import annotations

import logging

import msgspec

from stella_collector import probe_cost
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_collector.probes import ProbeState, probes_of
from stella_shared.config import Filters, Networks, Paths, Signals
from stella_shared.errors import BadAnswer, NotPermitted, StellaError

log = logging.getLogger(__name__)


class ProbeResult(msgspec.Struct, frozen=True):
    """One row of `stella signals test-probes`.

    `cost_ns` is kernel time for an event, over `cost_events` of them; None where it was not measured.
    """

    probe: str
    attach_point: str
    kernel: bool
    permission: bool
    attached: bool
    cost_ns: float | None
    cost_events: int
    reason: str
    fix: str


#: The reason of a probe that is not to attach: that is no failure.
OFF = "switched off in the configuration"


def exit_code(rows: list[ProbeResult]) -> int:
    """Return 0 when every wanted probe attaches, 3 when the permission for one is missing, else 1."""
    bad = [row for row in rows if not row.attached and row.reason != OFF]
    if any(not row.permission for row in bad):
        return NotPermitted.exit_code
    return BadAnswer.exit_code if bad else 0


def run(signals: Signals) -> list[ProbeResult]:
    """Try every probe; never raises for what the kernel refuses."""
    bare = msgspec.structs.replace(
        signals, filters=Filters(paths=Paths(allowlist=[], denylist=[]), networks=Networks(denylist=[])),
        max_events_per_second=0,
    )  # fmt: skip
    try:
        lib = Libbpf()
        with Kernel(bare, lib, watch_nothing=True) as kernel:
            kernel.attach()
            kernel.attach_libraries_of_node()
            costs = _costs(kernel, lib)
            return [_result(s, *costs.get(s.name, (None, 0))) for s in kernel.states]
    except StellaError as e:
        refused = e.exit_code == 3
        return [
            ProbeResult(p.name, p.attach_point(), e.exit_code != 4, not refused, False, None, 0, str(e), e.hint)
            if wanted
            else ProbeResult(p.name, p.attach_point(), True, True, False, None, 0, OFF, "")
            for p, wanted in probes_of(signals)
        ]


def _result(state: ProbeState, cost_ns: float | None, events: int) -> ProbeResult:
    return ProbeResult(
        state.name,
        state.attach_point,
        state.kernel,
        state.permission,
        state.attached,
        cost_ns,
        events,
        state.reason,
        state.fix,
    )


def _costs(kernel: Kernel, lib: Libbpf) -> dict[str, tuple[float, int]]:
    try:
        return probe_cost.measure(kernel, lib)
    except StellaError as e:
        log.warning("the probes' cost was not measured: %s", e)
        return {}
