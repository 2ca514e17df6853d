"""What the gateway makes of heartbeats."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from stella_gateway import exposition
from stella_gateway.board import FORGOTTEN_SECONDS, Board
from stella_shared import metrics
from stella_shared.wire import LOSS_CAUSES, Beat, Histogram

EXPECTED = {"collector": 1, "enricher": 2, "signer": 1}


def beat(
    service: str,
    instance: str = "n",
    state: str = "ok",
    *,
    reason: str = "",
    node: str = "n",
    pid: int = 1,
    values: dict[str, float] | None = None,
    histograms: dict[str, Histogram] | None = None,
    detail: dict[str, object] | None = None,
) -> Beat:
    return Beat(
        service,
        instance,
        node,
        pid,
        "1.0",
        0.0,
        0.0,
        state,
        reason,
        values or {},
        histograms or {},
        detail or {},
    )


def healthy(now: float = 0.0) -> Board:
    board = Board("n", EXPECTED, 0.0)
    board.bus_is("ok")
    for service, instance in (("collector", "n"), ("enricher", "n-1"), ("enricher", "n-2"), ("signer", "n")):
        board.hear(beat(service, instance), now)
    return board


def samples(board: Board, now: float) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = exposition.render(board, now).decode()
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def of(service: str, instance: str = "n", **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"service": service, "instance": instance, **labels}.items()))


def test_a_node_is_healthy_when_every_expected_part_is_heard() -> None:
    """All components ok: the node is ok and ready."""
    board = healthy()
    health = board.health(1.0)
    assert ("ok", True, True) == (health.status, health.working, board.ready())
    assert ["bus", "collector", "enricher", "signer"] == list(health.components)


def test_silence_of_more_than_five_seconds_is_failure() -> None:
    """One silent part fails the node and is named with the seconds of its silence."""
    board = healthy()
    for now in range(1, 8):
        for service, instance in (("collector", "n"), ("enricher", "n-1"), ("signer", "n")):
            board.hear(beat(service, instance), float(now))
    health = board.health(7.4)
    assert ("failed", False) == (health.status, health.working)
    assert "no heartbeat for 7 s" == health.components["enricher"].reason
    assert "ok" == health.components["enricher"].instances["n-1"].state
    assert "ok" == health.components["signer"].state


def test_a_part_never_heard_is_starting_then_failed() -> None:
    """Right after the gateway's start nobody is blamed; later the missing part is."""
    board = Board("n", EXPECTED, 0.0)
    board.bus_is("ok")
    assert "starting" == board.health(1.0).status
    board.hear(beat("enricher", "n-1"), 6.0)
    health = board.health(6.5)
    assert ("failed", "no heartbeat for 6 s") == (
        health.components["signer"].state,
        health.components["signer"].reason,
    )
    assert ("failed", "1 of 2 instances heard") == (
        health.components["enricher"].state,
        health.components["enricher"].reason,
    )
    assert not board.ready()


def test_degraded_works_and_says_why() -> None:
    """A degraded part makes the node degraded, which still counts as working."""
    board = healthy()
    board.hear(beat("collector", state="degraded", reason="a probe is missing"), 1.0)
    health = board.health(1.0)
    assert ("degraded", True) == (health.status, health.working)
    assert "a probe is missing" == health.components["collector"].reason


def test_a_state_nobody_knows_is_failure_and_the_bus_counts() -> None:
    """An unknown state is not taken for a good one; without the bus nothing is healthy."""
    board = healthy()
    board.hear(beat("signer", state="splendid"), 1.0)
    assert "failed" == board.health(1.0).components["signer"].state
    board = healthy()
    board.bus_is("failed", "no NATS server answers")
    assert "no NATS server answers" == board.health(1.0).components["bus"].reason
    assert "failed" == board.health(1.0).status


def test_other_nodes_are_not_ours() -> None:
    """On a shared bus only this node's beats count."""
    board = healthy()
    board.hear(beat("signer", "m", "failed", node="m"), 1.0)
    assert "ok" == board.health(1.0).status
    assert ["n"] == list(board.health(1.0).components["signer"].instances)


def test_a_flood_of_instances_is_bounded_and_the_dead_are_forgotten() -> None:
    """Memory stays bounded; an instance that is gone for long, or left in good order, disappears."""
    board = healthy()
    for n in range(1000):
        board.hear(beat("stranger", f"s{n}"), 1.0)
    assert 256 == len(board.all())
    board.tick(FORGOTTEN_SECONDS + 2.0)
    assert [] == board.all()
    board = healthy()
    board.hear(beat("enricher", "n-3", "stopping"), 1.0)
    for instance in ("n-1", "n-2"):
        board.hear(beat("enricher", instance), 7.0)
    board.tick(7.0)
    assert ["n-1", "n-2"] == list(board.health(7.0).components["enricher"].instances)


def test_latency_is_that_of_the_last_minute() -> None:
    """Quantiles leave out what was counted more than a minute ago, and survive a restart."""
    board = healthy()
    slow = Histogram.with_bounds(*metrics.LATENCY_BOUNDS_SECONDS)
    slow.observe(5.0, 1000)
    board.hear(beat("enricher", "n-1", histograms={metrics.ENRICH_LATENCY_SECONDS: slow}), 0.0)
    assert 5.0 == board.quantile_seconds(metrics.ENRICH_LATENCY_SECONDS, 0.99, 0.0)
    for second in range(1, 63):
        now = Histogram(slow.bounds, list(slow.counts), slow.total)
        now.observe(0.004, second)
        board.hear(beat("enricher", "n-1", histograms={metrics.ENRICH_LATENCY_SECONDS: now}), float(second))
    assert 0.005 == board.quantile_seconds(metrics.ENRICH_LATENCY_SECONDS, 0.99, 62.0)
    fresh = Histogram.with_bounds(*metrics.LATENCY_BOUNDS_SECONDS)
    fresh.observe(0.09, 3)
    board.hear(beat("enricher", "n-1", pid=2, histograms={metrics.ENRICH_LATENCY_SECONDS: fresh}), 63.0)
    assert 0.1 == board.quantile_seconds(metrics.ENRICH_LATENCY_SECONDS, 0.5, 63.0)
    assert None is board.quantile_seconds(metrics.DURABLE_LATENCY_SECONDS, 0.5, 63.0)


def test_the_exposition_shows_each_instance_apart() -> None:
    """Two enrichers' counters stand side by side, so that a restart of one never makes a sum go backwards."""
    board = healthy()
    key = metrics.key(metrics.EVENTS_TOTAL, type="file_open")
    board.hear(beat("enricher", "n-1", values={key: 1000}), 1.0)
    board.hear(beat("enricher", "n-2", values={key: 500}), 1.0)
    board.hear(beat("enricher", "n-1", pid=2, values={key: 3}), 2.0)
    found = samples(board, 2.0)
    assert 3 == found[metrics.EVENTS_TOTAL, of("enricher", "n-1", type="file_open")]
    assert 500 == found[metrics.EVENTS_TOTAL, of("enricher", "n-2", type="file_open")]


def test_the_exposition_names_the_whole_catalogue_and_starts_losses_at_zero() -> None:
    """Every metric is there by name, and an alert on losses sees the series before the first loss."""
    board = healthy()
    text = exposition.render(board, 1.0).decode()
    for metric in metrics.CATALOGUE.values():
        kind = metric.kind if metric.kind != "counter" or metric.name.endswith("_total") else "untyped"
        assert f"# TYPE {metric.name} {kind}\n" in text
    found = samples(board, 1.0)
    for cause in LOSS_CAUSES:
        assert 0 == found[metrics.DROPS_TOTAL, of("collector", cause=cause)]
    assert 0 == found[metrics.REKOR_FAILURES, of("signer")]
    assert 1 == found[metrics.SERVICE_UP, of("signer")]


def test_a_silent_instance_keeps_only_its_zero() -> None:
    """Old numbers are not shown as if they were new."""
    board = healthy()
    board.hear(beat("collector", values={metrics.EVENTS_RATE: 9000.0}), 1.0)
    assert 9000 == samples(board, 2.0)[metrics.EVENTS_RATE, of("collector")]
    found = samples(board, 10.0)
    assert (metrics.EVENTS_RATE, of("collector")) not in found
    assert 0 == found[metrics.SERVICE_UP, of("collector")]
    status: dict[str, Any] = board.status(10.0)
    assert (None, None, None) == (
        status["rates"]["events_per_second"],
        status["totals"]["lost_by_cause"],
        status["queues"]["ringbuf_usage_percent"],
    )


def test_losses_are_dated_once() -> None:
    """A loss stands in the history at its second; silence, return and restart of the collector add none."""
    board = healthy()
    key = metrics.key(metrics.DROPS_TOTAL, cause="ring_full")
    for now, lost in ((1.0, 0.0), (2.0, 7.0), (3.0, 7.0), (20.0, None), (21.0, 7.0), (22.0, 9.0), (23.0, 1.0)):
        if lost is not None:
            board.hear(beat("collector", values={key: lost}), now)
        board.tick(now)
    status: dict[str, Any] = board.status(23.0)
    assert [0, 7, 0, 0, 0, 2, 0] == status["rates"]["history_lost_per_second"]
    assert 7 == len(status["queues"]["history_ringbuf_usage_percent"])


def test_the_loudest_containers_are_summed_over_the_enrichers() -> None:
    """Most lines first, twenty at the most; what makes no sense in a heartbeat is passed over."""
    board = healthy()
    name = "docker://" + "ab" * 32
    rows: list[object] = [{"container": name, "image": "web:1", "lines_per_second": 2.5}, {"container": 7}, "nonsense"]
    flood = [{"container": f"host-{n:02}", "image": "", "lines_per_second": 1} for n in range(40)]
    board.hear(beat("enricher", "n-1", detail={"containers": rows}), 1.0)
    board.hear(
        beat(
            "enricher", "n-2", detail={"containers": [{"container": name, "image": "", "lines_per_second": 4}, *flood]}
        ),
        1.0,
    )
    board.hear(beat("collector", detail={"containers": rows}), 1.0)
    told = board.status(1.0)["rates"]["by_container_per_second"]
    assert {"container": name, "image": "web:1", "lines_per_second": 6.5} == told[0]
    assert 20 == len(told)
    board.hear(beat("enricher", "n-1", detail={"containers": "none"}), 2.0)
    assert 4.0 == board.status(2.0)["rates"]["by_container_per_second"][0]["lines_per_second"]


def test_rates_by_type_are_means_over_some_seconds() -> None:
    """Lines a second of each type; an enricher that starts anew makes none negative, and silence ends them."""
    board = healthy()
    opens, execs = (metrics.key(metrics.EVENTS_TOTAL, type=name) for name in ("file_open", "process_exec"))
    for now, total in ((1.0, 0.0), (2.0, 100.0), (3.0, 200.0)):
        board.hear(beat("enricher", "n-1", values={opens: total, execs: 4.0}), now)
        board.tick(now)
    status: dict[str, Any] = board.status(3.0)
    assert {"file_open": 100.0, "process_exec": 0.0} == status["rates"]["by_type_per_second"]
    board.hear(beat("enricher", "n-1", values={opens: 5.0}), 4.0)
    board.tick(4.0)
    status = board.status(4.0)
    assert status["rates"]["by_type_per_second"]["file_open"] >= 0.0
    board.tick(30.0)
    status = board.status(30.0)
    assert {} == status["rates"]["by_type_per_second"]


def test_histograms_are_cumulative_and_p99_is_in_milliseconds() -> None:
    """Buckets add up to the count, and the runbook's p99 is in milliseconds."""
    board = healthy()
    histogram = Histogram.with_bounds(*metrics.LATENCY_BOUNDS_SECONDS)
    for value, times in ((0.0004, 5), (0.02, 4), (100.0, 1)):
        histogram.observe(value, times)
    board.hear(beat("enricher", "n-1", histograms={metrics.ENRICH_LATENCY_SECONDS: histogram}), 1.0)
    found = samples(board, 1.0)
    name = metrics.ENRICH_LATENCY_SECONDS
    assert [5, 5, 9, 9, 10] == [
        found[f"{name}_bucket", of("enricher", "n-1", le=le)] for le in ("0.0005", "0.01", "0.025", "60.0", "+Inf")
    ]
    assert 10 == found[f"{name}_count", of("enricher", "n-1")]
    assert 60000 == found[metrics.ENRICH_LATENCY_P99, ()]


def test_what_the_catalogue_does_not_know_is_left_out() -> None:
    """Unknown names, wrong labels and broken histograms do not reach Prometheus, and nothing raises."""
    board = healthy()
    board.hear(
        beat(
            "signer",
            values={
                "evil{a=b}": 1.0,
                "}{": 1.0,
                metrics.DROPS_TOTAL: 1.0,
                metrics.key(metrics.CHUNKS_SIGNED, x="y"): 1.0,
                metrics.DURABLE_LATENCY_SECONDS: 1.0,
                metrics.ENRICH_LATENCY_P99: 1.0,
            },
            histograms={
                metrics.DURABLE_LATENCY_SECONDS: Histogram([1.0], [1]),
                "evil": Histogram([1.0], [1, 1]),
            },
        ),
        1.0,
    )
    found = samples(board, 1.0)
    assert not [key for key in found if "evil" in key[0] or ("x", "y") in key[1]]
    assert (metrics.DROPS_TOTAL, of("signer")) not in found
    assert (metrics.ENRICH_LATENCY_P99, of("signer")) not in found
    assert (f"{metrics.DURABLE_LATENCY_SECONDS}_count", of("signer")) not in found
    board.status(1.0)


def test_status_puts_probes_chain_and_accounting_together() -> None:
    """The collector's probes with reason and fix, the signer's chain and identity, sums by cause."""
    board = healthy()
    board.hear(
        beat(
            "collector",
            values={
                metrics.key(metrics.PROBE_ATTACHED, probe="openssl_read"): 0.0,
                metrics.key(metrics.DROPS_TOTAL, cause="ring_full"): 7.0,
            },
            detail={
                "probes": [
                    {"name": "openssl_read", "wanted": True, "reason": "no libssl", "fix": "install it"},
                    3,
                ]
            },
        ),
        1.0,
    )
    board.hear(beat("signer", values={metrics.LINES_TOTAL: 5.0}, detail={"chain_id": "c", "index": 4, "x": 1}), 1.0)
    status = board.status(1.0)
    assert [
        {
            "probe": "openssl_read",
            "attached": False,
            "wanted": True,
            "attach_point": "",
            "scope": "node",
            "reason": "no libssl",
            "fix": "install it",
        }
    ] == status["probes"]
    assert {"chain_id": "c", "index": 4} == status["chain"]
    assert {"recorded": 5.0, "filtered": 0, "lost": 7.0} == status["identity"]
    assert {"ring_full": 7.0} == status["totals"]["lost_by_cause"]  # type: ignore[index]
