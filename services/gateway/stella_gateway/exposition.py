"""The board as Prometheus text: the one module that speaks prometheus_client.

Every series carries `service` and `instance`.  Nothing is added up across instances: a restarted instance
starts its counters again at 0, which Prometheus knows how to read, while a sum would go backwards.
Series of a silent instance are left out, but for its `service_up 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from stella_gateway.board import Board, Instance
from stella_shared import metrics
from stella_shared.wire import LOSS_CAUSES, Histogram

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def render(board: Board, now: float) -> bytes:
    """Return the whole exposition, every metric of the catalogue present at least by name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Board(board, lambda: now))
    return generate_latest(registry)


class _Board(Collector):
    """Reads the board at each scrape."""

    def __init__(self, board: Board, clock: Callable[[], float]) -> None:
        self._board = board
        self._clock = clock

    def describe(self) -> list[Family]:
        """Nothing is known before a scrape."""
        return []

    def collect(self) -> Iterator[Family]:
        now = self._clock()
        families = {name: _family(metric) for name, metric in metrics.CATALOGUE.items()}
        live = self._board.live(now)
        for instance in self._board.all():
            working = instance in live and instance.state(now).state != "failed"
            families[metrics.SERVICE_UP].add_sample(metrics.SERVICE_UP, _labels(instance), float(working))
        for instance, metric, labels, value in self._board.values(now):
            families[metric.name].add_sample(metric.name, {**labels, **_labels(instance)}, value)
        for instance in live:
            for name, labels in _zeros(instance):
                families[name].add_sample(name, {**labels, **_labels(instance)}, 0.0)
            for name, histogram in instance.beat.histograms.items():
                if name in families and metrics.CATALOGUE[name].kind == "histogram":
                    _add_histogram(families[name], name, histogram, _labels(instance))
        p99 = self._board.quantile_seconds(metrics.ENRICH_LATENCY_SECONDS, 0.99, now)
        families[metrics.ENRICH_LATENCY_P99].add_sample(metrics.ENRICH_LATENCY_P99, {}, (p99 or 0.0) * 1000)
        yield from families.values()


def _labels(instance: Instance) -> dict[str, str]:
    return {"service": instance.beat.service, "instance": instance.beat.instance}


def _family(metric: metrics.Metric) -> Family:
    """Return an empty family.

    The library lets only names that end in _total be counters; the runbook's `chunks_signed` and
    `rekor_failures` are counters without it, and are called untyped rather than something they are not.
    """
    if metric.kind != "counter":
        return Family(metric.name, metric.help, metric.kind)
    if metric.name.endswith("_total"):
        return Family(metric.name.removesuffix("_total"), metric.help, "counter")
    return Family(metric.name, metric.help, "unknown")


def _zeros(instance: Instance) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield series that stand at 0 before their first event, so that an alert sees the first one too."""
    said = instance.beat.metrics
    if instance.beat.service == "collector":
        for cause in LOSS_CAUSES:
            if metrics.key(metrics.DROPS_TOTAL, cause=cause) not in said:
                yield metrics.DROPS_TOTAL, {"cause": cause}
    if instance.beat.service == "signer" and metrics.REKOR_FAILURES not in said:
        yield metrics.REKOR_FAILURES, {}


def _add_histogram(family: Family, name: str, histogram: Histogram, labels: dict[str, str]) -> None:
    """Add a histogram with cumulative buckets, as Prometheus wants them; a broken one is left out."""
    if len(histogram.counts) != len(histogram.bounds) + 1:
        return
    seen = 0
    for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        seen += count
        family.add_sample(f"{name}_bucket", {**labels, "le": bound}, float(seen))
    family.add_sample(f"{name}_count", labels, float(seen))
    family.add_sample(f"{name}_sum", labels, histogram.total)
