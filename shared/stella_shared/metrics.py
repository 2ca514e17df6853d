"""The catalogue of metrics: every name, kind, unit and label, declared here and nowhere else.

Services count under these names in `Beat.metrics` (`key` writes a label set into the name) and in
`Beat.histograms`; the gateway exposes them with `service` and `instance` beside the labels listed here.
Each instance's series stand alone and are never added up by us: a restarted instance begins again at 0 as a
Prometheus counter may, and `sum by (…) (rate(…))` does the adding.
"""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

Kind = Literal["counter", "gauge", "histogram"]

EVENTS_TOTAL: Final = "stellaops_signals_events_total"
EVENTS_RATE: Final = "stellaops_signals_events_rate"
RINGBUF_USAGE: Final = "stellaops_signals_ringbuf_usage"
RINGBUF_BYTES: Final = "stellaops_signals_ringbuf_bytes"
DROPS_TOTAL: Final = "stellaops_signals_drops_total"
FILTERED_TOTAL: Final = "stellaops_signals_filtered_total"
ENRICH_LATENCY_P99: Final = "stellaops_signals_enrich_latency_p99"
ENRICH_LATENCY_SECONDS: Final = "stellaops_signals_enrich_latency_seconds"
KERNEL_TO_LINE_LATENCY_SECONDS: Final = "stellaops_signals_kernel_to_line_latency_seconds"
DURABLE_LATENCY_SECONDS: Final = "stellaops_signals_durable_latency_seconds"
SIGNED_LATENCY_SECONDS: Final = "stellaops_signals_signed_latency_seconds"
CHUNKS_SIGNED: Final = "stellaops_signals_chunks_signed"
CHUNKS_LOGGED: Final = "stellaops_signals_chunks_logged"
REKOR_FAILURES: Final = "stellaops_signals_rekor_failures"
REKOR_PENDING: Final = "stellaops_signals_rekor_pending"
BATCHES_TOTAL: Final = "stellaops_signals_batches_total"
LINES_TOTAL: Final = "stellaops_signals_lines_total"
SPOOL_BYTES: Final = "stellaops_signals_spool_bytes"
RUN_ADOPTED: Final = "stellaops_signals_run_adopted"
LET_GO_TOTAL: Final = "stellaops_signals_batches_let_go_total"
PUBLISH_RETRIES_TOTAL: Final = "stellaops_signals_publish_retries_total"
CONTAINERS_UNKNOWN_TOTAL: Final = "stellaops_signals_containers_unknown_total"
NAMES_MISSING_TOTAL: Final = "stellaops_signals_names_missing_total"
IMAGES_UNKNOWN: Final = "stellaops_signals_images_unknown"
RUNTIME_UP: Final = "stellaops_signals_runtime_up"
REDACTIONS_TOTAL: Final = "stellaops_signals_redactions_total"
BUS_WAITING_BYTES: Final = "stellaops_signals_bus_waiting_bytes"
SIGN_LAG_BATCHES: Final = "stellaops_signals_sign_lag_batches"
SERVICE_UP: Final = "stellaops_signals_service_up"
PROBE_ATTACHED: Final = "stellaops_signals_probe_attached"

#: Upper bounds of every latency histogram, in seconds (`Histogram.with_bounds(*LATENCY_BOUNDS_SECONDS)`).
LATENCY_BOUNDS_SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip

#: Those of the time to the signed statement: a chunk may be open for an hour and more.
SIGNED_BOUNDS_SECONDS: Final = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0,
)  # fmt: skip


class Metric(msgspec.Struct, frozen=True):
    """One metric: what it counts, in which unit, under which labels, and which services produce it."""

    name: str
    kind: Kind
    unit: str
    help: str
    producers: tuple[str, ...]
    labels: tuple[str, ...] = ()
    alert: str = ""


_METRICS: Final = (
    Metric(
        EVENTS_TOTAL,
        "counter",
        "events",
        "Events that became an evidence line, by event type.",
        ("enricher",),
        ("type",),
    ),
    Metric(
        EVENTS_RATE,
        "gauge",
        "events per second",
        "Events per second taken from the ring buffer, mean over about a second.",
        ("collector",),
        alert="> 100000: high load",
    ),
    Metric(
        RINGBUF_USAGE,
        "gauge",
        "percent",
        "Fill of the ring buffer, in percent of its size.",
        ("collector",),
        alert="> 80: overflow is near",
    ),
    Metric(
        RINGBUF_BYTES,
        "gauge",
        "bytes",
        "Size of the ring buffer between kernel and collector.",
        ("collector",),
    ),
    Metric(
        DROPS_TOTAL,
        "counter",
        "events",
        "Events lost, by cause. Each is accounted for in the evidence.",
        ("collector", "enricher", "signer"),
        ("cause",),
        alert="> 0: investigate",
    ),
    Metric(
        FILTERED_TOTAL,
        "counter",
        "events",
        "Events that filters kept out: kernel_* before they were recorded, user_* after.",
        ("collector", "enricher"),
        ("cause",),
    ),
    Metric(
        ENRICH_LATENCY_P99,
        "gauge",
        "milliseconds",
        "99th percentile of the enrichment latency over the last minute, in milliseconds: the upper bound "
        "of its histogram bucket. Computed by the gateway from stellaops_signals_enrich_latency_seconds; "
        "0 when nothing was enriched in that minute.",
        ("gateway",),
        alert="> 50: degraded",
    ),
    Metric(
        ENRICH_LATENCY_SECONDS,
        "histogram",
        "seconds",
        "From a batch's arrival in the enricher to its last line accepted by the bus.",
        ("enricher",),
    ),
    Metric(
        KERNEL_TO_LINE_LATENCY_SECONDS,
        "histogram",
        "seconds",
        "From the kernel's timestamp of an event to its finished evidence line.",
        ("enricher",),
    ),
    Metric(
        DURABLE_LATENCY_SECONDS,
        "histogram",
        "seconds",
        "From the kernel's timestamp of an event to its line being safe on the signer's disk.",
        ("signer",),
    ),
    Metric(
        SIGNED_LATENCY_SECONDS,
        "histogram",
        "seconds",
        "Time from the drain of the ring buffer to the signed statement, one observation for each line: how long root "
        "could still rewrite it unseen.",
        ("signer",),
    ),
    Metric(CHUNKS_SIGNED, "counter", "chunks", "Chunks signed.", ("signer",)),
    Metric(
        REKOR_FAILURES,
        "counter",
        "submissions",
        "Failed submissions to the transparency log. 0 while no log is configured.",
        ("signer",),
        alert="> 0: investigate",
    ),
    Metric(
        REKOR_PENDING,
        "gauge",
        "chunks",
        "Signed chunks that are to be submitted to the transparency log and are not in it yet.",
        ("signer",),
        alert="rising: the log is away, see rekor_failures",
    ),
    Metric(
        CHUNKS_LOGGED,
        "counter",
        "chunks",
        "Chunks whose entry in the transparency log was verified.",
        ("signer",),
    ),
    Metric(
        BATCHES_TOTAL,
        "counter",
        "batches",
        "Batches that the service has finished.",
        ("collector", "enricher", "signer"),
    ),
    Metric(LINES_TOTAL, "counter", "lines", "Evidence lines written to chunks, each once.", ("signer",)),
    Metric(
        SPOOL_BYTES,
        "gauge",
        "bytes",
        "Batches held in the collector's memory until the bus takes them.",
        ("collector",),
    ),
    Metric(
        RUN_ADOPTED,
        "gauge",
        "1 or 0",
        "Whether the collector goes on with the run of one that was killed or restarted.",
        ("collector",),
    ),
    Metric(
        LET_GO_TOTAL,
        "counter",
        "batches",
        "Batches whose records gave way in the ring before the bus had them: a kill at that moment loses them.",
        ("collector",),
    ),
    Metric(
        PUBLISH_RETRIES_TOTAL,
        "counter",
        "attempts",
        "Publishes that the bus did not acknowledge and that were tried again.",
        ("collector", "enricher"),
    ),
    Metric(
        CONTAINERS_UNKNOWN_TOTAL,
        "counter",
        "events",
        "Events in a container that could not be named, by reason.",
        ("enricher",),
        ("reason",),
    ),
    Metric(
        NAMES_MISSING_TOTAL,
        "counter",
        "names",
        "Cgroups and programs of a batch about which something is not known, by reason.",
        ("collector",),
        ("reason",),
    ),
    Metric(
        IMAGES_UNKNOWN,
        "gauge",
        "containers",
        "Containers whose runtime has not said which image they run, by reason.",
        ("enricher",),
        ("reason",),
    ),
    Metric(
        RUNTIME_UP,
        "gauge",
        "",
        "1 while the socket of a container runtime answers, else 0; the reason is in /status.",
        ("enricher",),
        ("api", "socket"),
        alert="0: images, labels and selectors of that runtime are missing",
    ),
    Metric(
        REDACTIONS_TOTAL,
        "counter",
        "arguments",
        "Arguments that were redacted, by what did it: `rule` a built-in rule, `pattern` one of yours; `failure`: "
        "redaction failed, so the whole argument was replaced.",
        ("enricher",),
        ("cause",),
        alert="cause failure > 0: report it",
    ),
    Metric(
        SIGN_LAG_BATCHES,
        "gauge",
        "batches",
        "Batches on the bus that the signer has not yet made durable.",
        ("signer",),
    ),
    Metric(
        BUS_WAITING_BYTES,
        "gauge",
        "bytes",
        "Stored on the bus and not finished: `raw` by the enrichers, `enriched` by the signer.",
        ("gateway",),
        ("stream",),
    ),
    Metric(
        SERVICE_UP,
        "gauge",
        "",
        "1 while the instance's heartbeats arrive and it has not failed, else 0.",
        ("gateway",),
    ),
    Metric(
        PROBE_ATTACHED,
        "gauge",
        "",
        "1 while the probe is attached, 0 when it could not be; the reason is in /status.",
        ("collector",),
        ("probe",),
    ),
)

CATALOGUE: Final[dict[str, Metric]] = {metric.name: metric for metric in _METRICS}

_NOT_LABEL_VALUE = re.compile(r"[^A-Za-z0-9_.:/-]")
_KEY = re.compile(r"([a-z_][a-z0-9_]*)(?:\{([^{}]*)\})?")


def key(name: str, **labels: str) -> str:
    """Return `name{label=value,…}`, the key of a labelled value in `Beat.metrics`.

    Characters other than letters, digits and `_.:/-` in a value become `_`.
    """
    if not labels:
        return name
    pairs = ",".join(f"{label}={_NOT_LABEL_VALUE.sub('_', value)}" for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}"


def parse_key(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and labels of a key that `key` made.  Raises `ValueError` for anything else."""
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text[:80]!r} is not a metric key")
    labels: dict[str, str] = {}
    for pair in match[2].split(",") if match[2] else ():
        label, equals, value = pair.partition("=")
        if not equals or not label.isidentifier() or _NOT_LABEL_VALUE.search(value):
            raise ValueError(f"{text[:80]!r} is not a metric key")
        labels[label] = value
    return match[1], labels
