"""What the collector says of itself, once a second."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec

from stella_collector.spool import SPOOL_BYTES
from stella_shared import VERSION, metrics, privileges
from stella_shared.selectors import MAX_CONTAINERS, STALE_SECONDS
from stella_shared.wire import Beat

if TYPE_CHECKING:
    from stella_collector.app import Collector


def beat_of(collector: Collector) -> Beat:
    """Return the heartbeat of `collector`."""
    kernel, draining, spool, selected = collector.kernel, collector.draining, collector.spool, collector.selected
    missing = [s for s in kernel.states if s.wanted and not s.attached and s.scope == "node"]
    state, reason = "ok", ""
    if spool.last_error:
        state, reason = "degraded", f"batches wait in memory: {spool.last_error}"
    elif not any(s.attached for s in kernel.states):
        state, reason = "failed", "no probe is attached"
    elif [s for s in missing if s.kernel and not s.reason.startswith("no libssl")]:
        state, reason = "degraded", "; ".join(f"{s.name}: {s.reason}" for s in missing)
    elif selected.wanted and not selected.heard and time.time() - collector.started_at > STALE_SECONDS:
        state, reason = "degraded", "no enricher says which containers the selectors match"
    elif selected.truncated:
        state, reason = (
            "degraded",
            f"more than {MAX_CONTAINERS} containers match the selectors: not all are watched",
        )
    dropped = {f"stellaops_signals_drops_total{{cause={c}}}": float(n) for c, n in draining.lost.items()}
    filtered = {f"stellaops_signals_filtered_total{{cause={c}}}": float(n) for c, n in draining.filtered.items()}
    attached = {f"stellaops_signals_probe_attached{{probe={s.name}}}": float(s.attached) for s in kernel.states}
    unnamed = {metrics.key(metrics.NAMES_MISSING_TOTAL, reason=r): float(n) for r, n in draining.namer.missing.items()}
    return Beat(
        service="collector",
        instance=f"{collector.node}",
        node=collector.node,
        pid=os.getpid(),
        version=VERSION,
        at=time.time(),
        started_at=collector.started_at,
        state=state,
        reason=reason,
        metrics={
            "stellaops_signals_events_rate": round(collector.rate, 1),
            "stellaops_signals_ringbuf_usage": round(draining.ring_percent, 2),
            "stellaops_signals_ringbuf_bytes": float(kernel.ring.size),
            "stellaops_signals_batches_total": float(draining.number),
            "stellaops_signals_spool_bytes": float(spool.bytes),
            metrics.RUN_ADOPTED: float(collector.adopted),
            metrics.LET_GO_TOTAL: float(draining.let_go),
            "stellaops_signals_publish_retries_total": float(spool.retries),
            **dropped,
            **filtered,
            **attached,
            **unnamed,
        },
        detail={
            "run": collector.runs.current,
            "boot_id": draining.boot_id,
            "config": collector.config_state,
            "records": draining.records,
            "batches": draining.number,
            "published": spool.published,
            "spool_bytes": spool.bytes,
            "spool_max_bytes": SPOOL_BYTES,
            "reader": collector.fixed["reader"],
            "libbpf": collector.lib.version,
            "libraries": kernel.libraries,
            "binaries": msgspec.to_builtins(kernel.binaries.states()),
            "privileges": privileges.left(),
            "io_uring": collector.uring,
            "adopted": collector.adopted,
            "adopted_batches": collector.adopted_batches,
            "let_go_batches": draining.let_go,
            "counters_pinned": collector.runs.pinned,
            "counters_pin_reason": collector.runs.pin_reason,
            "names": {**draining.namer.stats(), "missing": draining.namer.missing},
            "lost": draining.lost,
            "filtered": draining.filtered,
            "targets": [
                {"asked": t.asked, "id": t.id} | ({"container": t.container} if t.container else {})
                for t in collector.targets
            ],
            "probes": [
                {
                    "name": s.name,
                    "attach_point": s.attach_point,
                    "wanted": s.wanted,
                    "attached": s.attached,
                    "scope": s.scope,
                    "reason": s.reason,
                    "fix": s.fix,
                }
                for s in kernel.states
            ],
        },
    )
