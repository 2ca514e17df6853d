"""What is known of the node from its heartbeats: the one state of the gateway, and the views of it.

Pure: beats and clock readings (`now`, seconds of any steady clock) go in, views come out.
Only this node's beats count.  An instance that is silent for `SILENT_SECONDS` has failed; its numbers are not
shown any more, and after `FORGOTTEN_SECONDS` neither is the instance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final

import msgspec

from stella_shared import metrics
from stella_shared.wire import Beat, Histogram

SILENT_SECONDS: Final = 5.0
FORGOTTEN_SECONDS: Final = 900.0
HISTORY_SECONDS: Final = 120
LATENCY_WINDOW_SECONDS: Final = 60.0
#: Rates by event type are means over this long.
TYPE_RATE_SECONDS: Final = 5
#: A node has a handful; more than this is a mistake, and must not fill our memory.
MAX_INSTANCES: Final = 256
MAX_METRICS: Final = 1024
#: Containers whose rates are shown.
LOUDEST_MAX: Final = 20

#: From good to bad; a component is as bad as its worst instance.
_SEVERITY: Final = ("ok", "degraded", "starting", "stopping", "failed")
Severity = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(_SEVERITY)})]
#: States in which evidence is being recorded.
_WORKING: Final = frozenset({"ok", "degraded"})


class State(msgspec.Struct, frozen=True):
    """How a component or an instance is, and why."""

    state: Severity
    reason: str = ""


class Component(msgspec.Struct, frozen=True):
    """One part of the node that must be there."""

    state: Severity
    reason: str
    instances: dict[str, State]


class Health(msgspec.Struct, frozen=True):
    """The answer to /health: `status` is that of the worst component."""

    status: Severity
    node: str
    components: dict[str, Component]

    @property
    def working(self) -> bool:
        """True while every component does its work, if perhaps not all of it."""
        return self.status in _WORKING


class Instance:
    """One instance of a service: its last beat, and its latency histograms of the last minute."""

    def __init__(self, beat: Beat, now: float) -> None:
        self.beat = beat
        self.heard = now
        self._past: deque[tuple[float, int, dict[str, Histogram]]] = deque()

    def hear(self, beat: Beat, now: float) -> None:
        """Take a newer beat."""
        self.beat = beat
        self.heard = now
        self._past.append((now, beat.pid, beat.histograms))
        while len(self._past) > 2 and self._past[1][0] <= now - LATENCY_WINDOW_SECONDS:
            self._past.popleft()

    def silent_seconds(self, now: float) -> float:
        """Seconds since the last beat."""
        return now - self.heard

    def state(self, now: float) -> State:
        """How it is, by its own words or by its silence."""
        silent = self.silent_seconds(now)
        if silent > SILENT_SECONDS:
            return State("failed", f"no heartbeat for {silent:.0f} s")
        known = self.beat.state if self.beat.state in _SEVERITY else "failed"
        return State(known, self.beat.reason)

    def recent(self, name: str) -> Histogram | None:
        """Return what histogram `name` counted in the last minute.  A restart inside it begins again at 0."""
        new = self.beat.histograms.get(name)
        if new is None or len(new.counts) != len(new.bounds) + 1:
            return None
        _, pid, histograms = self._past[0]
        old = histograms.get(name)
        if pid != self.beat.pid or old is None or old.bounds != new.bounds or len(self._past) == 1:
            return new
        counts = [max(0, a - b) for a, b in zip(new.counts, old.counts, strict=True)]
        return Histogram(new.bounds, counts, new.total - old.total)


class Board:
    """Everything heard.  `expected` gives how many instances of each service a healthy node has."""

    def __init__(self, node: str, expected: Mapping[str, int], started: float) -> None:
        self.node = node
        self._expected = dict(expected)
        self._started = started
        self._instances: dict[tuple[str, str], Instance] = {}
        self._bus = State("starting", "connecting")
        self._seen: set[str] = set()
        self._rates: deque[float] = deque(maxlen=HISTORY_SECONDS)
        self._losses: deque[float] = deque(maxlen=HISTORY_SECONDS)
        self._ring: deque[float] = deque(maxlen=HISTORY_SECONDS)
        self._lost_before: float | None = None
        self._types: deque[tuple[float, dict[str, float]]] = deque(maxlen=TYPE_RATE_SECONDS + 1)

    # ---- in

    def hear(self, beat: Beat, now: float) -> None:
        """Take a beat; other nodes' are passed over."""
        if beat.node != self.node or len(beat.metrics) > MAX_METRICS:
            return
        who = (beat.service, beat.instance)
        if who not in self._instances:
            if len(self._instances) >= MAX_INSTANCES:
                return
            self._instances[who] = Instance(beat, now)
        self._instances[who].hear(beat, now)
        self._seen.add(beat.service)

    def bus_is(self, state: str, reason: str = "") -> None:
        """Note how the bus is."""
        self._bus = State(state, reason)

    def tick(self, now: float) -> None:
        """Once a second: note rates, losses and the ring's fill for the histories, forget who is long gone."""
        self._rates.append(self._sum(metrics.EVENTS_RATE, now) or 0.0)
        self._ring.append(self._max(metrics.RINGBUF_USAGE, now) or 0.0)
        lost = self._by(metrics.DROPS_TOTAL, "cause", now)
        total = self._lost_before if lost is None else sum(lost.values())
        self._losses.append(max(0.0, (total or 0.0) - (self._lost_before or 0.0)))
        self._lost_before = total
        if (types := self._by(metrics.EVENTS_TOTAL, "type", now)) is None:
            self._types.clear()
        else:
            self._types.append((now, types))
        for who, instance in list(self._instances.items()):
            silent = instance.silent_seconds(now)
            left = instance.beat.state == "stopping" and silent > SILENT_SECONDS
            if (left and self._replaced(who[0], now)) or silent > FORGOTTEN_SECONDS:
                del self._instances[who]

    def _replaced(self, service: str, now: float) -> bool:
        """True when enough instances of `service` live without the ones that left."""
        return len([i for i in self.live(now) if i.beat.service == service]) >= self._expected.get(service, 0)

    # ---- out

    def live(self, now: float) -> list[Instance]:
        """Return the instances that are heard, by service and name."""
        return [i for _, i in sorted(self._instances.items()) if i.silent_seconds(now) <= SILENT_SECONDS]

    def all(self) -> list[Instance]:
        """Return every instance that is remembered, by service and name."""
        return [i for _, i in sorted(self._instances.items())]

    def ready(self) -> bool:
        """True once the bus is there and each expected service was heard: answers have a meaning then."""
        return self._bus.state == "ok" and self._seen.issuperset(self._expected)

    def health(self, now: float) -> Health:
        """Return how the node is."""
        components = {"bus": Component(self._bus.state, self._bus.reason, {})}
        for service, count in self._expected.items():
            components[service] = self._component(service, count, now)
        worst = max((c.state for c in components.values()), key=_SEVERITY.index)
        return Health(worst, self.node, components)

    def _component(self, service: str, expected: int, now: float) -> Component:
        states = {i.beat.instance: i.state(now) for i in self.all() if i.beat.service == service}
        if len(states) < expected:
            waited = now - self._started
            missing = f"no heartbeat for {waited:.0f} s"
            if expected > 1:
                missing = f"{len(states)} of {expected} instances heard"
            absent = State("starting" if waited <= SILENT_SECONDS else "failed", missing)
            worst = max((absent, *states.values()), key=lambda s: _SEVERITY.index(s.state))
        else:
            worst = max(states.values(), key=lambda s: _SEVERITY.index(s.state))
        return Component(worst.state, worst.reason, states)

    def values(self, now: float) -> Iterator[tuple[Instance, metrics.Metric, dict[str, str], float]]:
        """Yield every counter and gauge of the live instances that the catalogue knows."""
        for instance in self.live(now):
            for text, value in instance.beat.metrics.items():
                try:
                    name, labels = metrics.parse_key(text)
                except ValueError:
                    continue
                metric = metrics.CATALOGUE.get(name)
                if metric is None or metric.kind == "histogram" or instance.beat.service not in metric.producers:
                    continue
                if set(labels) == set(metric.labels):
                    yield instance, metric, labels, value

    def quantile_seconds(self, name: str, q: float, now: float) -> float | None:
        """Return quantile `q` of a latency over the last minute and all instances; None when nothing came."""
        merged: Histogram | None = None
        for instance in self.live(now):
            part = instance.recent(name)
            if part is None:
                continue
            if merged is None:
                merged = Histogram(part.bounds, list(part.counts))
            elif merged.bounds == part.bounds:
                merged.counts = [a + b for a, b in zip(merged.counts, part.counts, strict=True)]
        return merged.quantile(q) if merged is not None and any(merged.counts) else None

    def status(self, now: float) -> dict[str, object]:
        """Return everything, for /status."""
        health = self.health(now)
        return {
            "status": health.status,
            "node": self.node,
            "components": health.components,
            "rates": {
                "events_per_second": self._sum(metrics.EVENTS_RATE, now),
                "by_type_per_second": self._type_rates(),
                "by_container_per_second": self._loudest(now),
                "history_events_per_second": [round(rate, 1) for rate in self._rates],
                "history_lost_per_second": [round(lost, 1) for lost in self._losses],
            },
            "queues": {
                "ringbuf_usage_percent": self._max(metrics.RINGBUF_USAGE, now),
                "history_ringbuf_usage_percent": [round(percent, 1) for percent in self._ring],
                "ringbuf_bytes": self._sum(metrics.RINGBUF_BYTES, now),
                "spool_bytes": self._sum(metrics.SPOOL_BYTES, now),
                "bus_waiting_bytes": self._by(metrics.BUS_WAITING_BYTES, "stream", now),
                "sign_lag_batches": self._sum(metrics.SIGN_LAG_BATCHES, now),
            },
            "latency_ms": {
                short: {f"p{round(q * 100)}": self._milliseconds(name, q, now) for q in (0.5, 0.99)}
                for short, name in _LATENCIES.items()
            },
            "totals": {
                "since": "each service's own start",
                "events_by_type": self._by(metrics.EVENTS_TOTAL, "type", now),
                "lines": self._sum(metrics.LINES_TOTAL, now),
                "filtered_by_cause": self._by(metrics.FILTERED_TOTAL, "cause", now),
                "lost_by_cause": self._by(metrics.DROPS_TOTAL, "cause", now),
                "chunks_signed": self._sum(metrics.CHUNKS_SIGNED, now),
                "chunks_logged": self._sum(metrics.CHUNKS_LOGGED, now),
                "rekor_pending": self._sum(metrics.REKOR_PENDING, now),
                "rekor_failures": self._sum(metrics.REKOR_FAILURES, now),
            },
            "probes": self._probes(now),
            "identity": self._identity(now),
            "chain": {k: v for k, kind in _CHAIN.items() if type(v := self._detail("signer", k, now)) is kind},
            "services": [self._service(i, now) for i in self.all()],
        }

    def _figures(self, name: str, now: float) -> list[float]:
        return [value for _, metric, _, value in self.values(now) if metric.name == name]

    def _sum(self, name: str, now: float) -> float | None:
        """Return the sum over all live instances; None when none tells: that is not the same as 0."""
        return sum(figures) if (figures := self._figures(name, now)) else None

    def _type_rates(self) -> dict[str, float]:
        """Return evidence lines a second by event type; {} until two looks at the totals are known."""
        if len(self._types) < 2:
            return {}
        (then, old), (now, new) = self._types[0], self._types[-1]
        # A restarted enricher counts from 0 again.
        return {name: round(max(0.0, n - old.get(name, 0.0)) / (now - then), 1) for name, n in new.items()}

    def _max(self, name: str, now: float) -> float | None:
        return max(self._figures(name, now), default=None)

    def _by(self, name: str, label: str, now: float) -> dict[str, float] | None:
        """Return sums by label; None when no producer is alive."""
        producer = metrics.CATALOGUE[name].producers[0]
        if not any(i.beat.service == producer for i in self.live(now)):
            return None
        sums: dict[str, float] = {}
        for _, metric, labels, value in self.values(now):
            if metric.name == name:
                sums[labels[label]] = sums.get(labels[label], 0.0) + value
        return dict(sorted(sums.items()))

    def _milliseconds(self, name: str, q: float, now: float) -> float | None:
        seconds = self.quantile_seconds(name, q, now)
        return None if seconds is None else seconds * 1000

    def _detail(self, service: str, key: str, now: float) -> object:
        """Return what a service says under `key` in its beats' detail; None when it is silent about it."""
        found = [i.beat.detail[key] for i in self.live(now) if i.beat.service == service and key in i.beat.detail]
        return found[0] if found else None

    def _loudest(self, now: float) -> list[dict[str, object]]:
        """Return the containers with the most lines, as the enrichers have told them in their last beats."""
        rates: dict[str, float] = {}
        images: dict[str, str] = {}
        for instance in self.live(now):
            told = instance.beat.detail.get("containers") if instance.beat.service == "enricher" else None
            for row in told[:LOUDEST_MAX] if isinstance(told, list) else ():
                match row:
                    case {"container": str(name), "image": str(image), "lines_per_second": float() | int() as rate}:
                        rates[name] = rates.get(name, 0.0) + float(rate)
                        images[name] = images.get(name) or image
        ranked = sorted(rates.items(), key=lambda item: (-item[1], item[0]))[:LOUDEST_MAX]
        return [{"container": name, "image": images[name], "lines_per_second": round(r, 1)} for name, r in ranked]

    def _identity(self, now: float) -> dict[str, float] | None:
        """Return recorded, filtered and lost since the services' starts; None while one of them is unknown.

        The statements hold the exact identity, chunk by chunk; here numbers in flight are not yet in any of them.
        """
        recorded = self._sum(metrics.LINES_TOTAL, now)
        filtered = self._by(metrics.FILTERED_TOTAL, "cause", now)
        lost = self._by(metrics.DROPS_TOTAL, "cause", now)
        if recorded is None or filtered is None or lost is None:
            return None
        return {"recorded": recorded, "filtered": sum(filtered.values()), "lost": sum(lost.values())}

    def _probes(self, now: float) -> list[dict[str, object]]:
        """Return each probe: attached or not by the metric; switched on, reason and fix by the detail."""
        said = self._detail("collector", "probes", now)
        entries = [e for e in said if isinstance(e, dict)] if isinstance(said, list) else []
        by_name = {str(e.get("name")): e for e in entries}
        probes: list[dict[str, object]] = []
        for _, metric, labels, value in self.values(now):
            if metric.name == metrics.PROBE_ATTACHED:
                name = labels["probe"]
                entry = by_name.get(name, {})
                more = {
                    key: told if type(told := entry.get(key)) is type(default) else default
                    for key, default in _PROBE_DETAIL.items()
                }
                probes.append({"probe": name, "attached": value > 0, **more})
        return probes

    def _service(self, instance: Instance, now: float) -> dict[str, Any]:
        beat = instance.beat
        state = instance.state(now)
        return {
            "service": beat.service,
            "instance": beat.instance,
            "pid": beat.pid,
            "version": beat.version,
            "state": state.state,
            "reason": state.reason,
            "started_at": beat.started_at,
            "heard_seconds_ago": round(instance.silent_seconds(now), 1),
            "detail": beat.detail,
        }


_LATENCIES: Final = {
    "enrich": metrics.ENRICH_LATENCY_SECONDS,
    "kernel_to_line": metrics.KERNEL_TO_LINE_LATENCY_SECONDS,
    "durable": metrics.DURABLE_LATENCY_SECONDS,
}
#: What a signer says of its chain; of another type it is not shown.
_CHAIN: Final = {
    "chain_id": str,
    "index": int,
    "last_statement_sha256": str,
    "open_lines": int,
    "open_bytes": int,
    "key_hint": str,
}
#: What a collector may say of a probe beside its name, and what holds when it does not.
_PROBE_DETAIL: Final[dict[str, object]] = {"wanted": True, "attach_point": "", "scope": "node", "reason": "", "fix": ""}
