"""`stella signals status`, `health` and `stats`: what the gateway knows, for people and for grep."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from stella_cli import caches, console, gateway
from stella_cli.memory import rows as memory_rows
from stella_cli.settings import Settings
from stella_shared import metrics
from stella_shared.errors import BadAnswer

_OWN_LABELS: Final = ("service", "instance")


def health(settings: Settings, *, as_json: bool) -> None:
    """Print each component's state.  Raises `BadAnswer` naming those that do not work."""
    answer = gateway.get(settings, "/health")
    body = answer.json()
    components: dict[str, Any] = body.get("components", {})
    if as_json:
        click.echo(json.dumps(body, ensure_ascii=False))
    else:
        click.echo(f"node {body['node']}: {body.get('status', '?')}")
        console.table(
            ["component", "state", "reason"],
            [[name, str(c.get("state", "?")), str(c.get("reason", ""))] for name, c in components.items()],
        )
    if answer.code != 200:
        bad = [
            f"{name} ({c.get('reason') or c.get('state')})"
            for name, c in components.items()
            if c.get("state") not in ("ok", "degraded")
        ]
        raise BadAnswer(
            f"the node is {body.get('status', 'not healthy')}: {', '.join(bad)}",
            hint="stella signals status --verbose shows more",
            runbook="health-checks",
        )


def status(settings: Settings, *, verbose: bool, as_json: bool) -> None:
    """Print what the node does."""
    body = gateway.get(settings, "/status").json()
    node = gateway.running_node(settings)
    if as_json:
        own = {"config": settings.name, "output_directory": settings.signals.output_directory}
        click.echo(json.dumps({**body, "command": own}, ensure_ascii=False))
        return
    demo = " (DEMO: replayed events)" if node and node.demo else ""
    click.echo(f"node {body['node']}: {body.get('status', '?')}{demo}")
    asked = targets(body)
    _pairs(
        {
            "evidence": node.output_directory if node else settings.signals.output_directory,
            "gateway": gateway.url(settings),
            **({"targets": asked} if asked else {}),
            **({"watched functions": functions} if (functions := watched_functions(body)) else {}),
            "events": _events(body),
            "lost": _sums(_at(body, "totals", "lost_by_cause")) or "nothing",
            "chunks signed": _number(_at(body, "totals", "chunks_signed")),
        }
    )
    console.table(
        ["service", "instance", "state", "pid", "up", "reason"],
        [
            [
                str(s.get("service")),
                str(s.get("instance")),
                str(s.get("state")),
                str(s.get("pid")),
                _duration(time.time() - float(s.get("started_at") or time.time())),
                str(s.get("reason", "")),
            ]
            for s in body.get("services", [])
        ],
    )
    if asked_runtimes := caches.runtimes(body):
        click.echo()
        console.table(caches.RUNTIME_COLUMNS, asked_runtimes)
    if verbose:
        _verbose(settings, body)


def targets(body: Mapping[str, Any]) -> str:
    """Return how many targets the node has found and which it has not; "" when it watches everything."""
    asked: dict[str, bool] = {}
    for service in body.get("services", []):
        for target in _at(service, "detail", "targets") or []:
            name = str(target["asked"])
            asked[name] = asked.get(name, False) or bool(target["id"])
    missing = ", ".join(name for name, is_there in asked.items() if not is_there)
    found = f"{sum(asked.values())} of {len(asked)} found" if asked else ""
    return f"{found}; not there (yet): {missing}" if missing else found


def watched_functions(body: Mapping[str, Any]) -> str:
    """Return how many functions are watched in how many binaries, and what is not; "" when none are asked for."""
    rows = [row for service in body.get("services", []) for row in _at(service, "detail", "binaries") or []]
    asked = [row for row in rows if row.get("mode") in ("trace", "count")]
    there = [row for row in asked if row.get("functions")]
    missing = ", ".join(f"{row.get('binary')}: {row.get('reason')}" for row in asked if not row.get("functions"))
    if not asked:
        return ""
    found = f"{_number(sum(row['functions'] for row in there))} in {len(there)} of {len(asked)} binaries"
    return f"{found}; not watched: {missing}" if missing else found


def _events(body: Mapping[str, Any]) -> str:
    rate = _at(body, "rates", "events_per_second")
    lines = f"{_number(_at(body, 'totals', 'lines'))} lines recorded"
    return lines if rate is None else f"{_number(rate)} per second, {lines}"


def _verbose(settings: Settings, body: Mapping[str, Any]) -> None:
    """Print the rest: what a support case needs."""
    system = os.uname()
    click.echo()
    _pairs(
        {
            "kernel": f"{system.release} {system.version} {system.machine}",
            "configuration": settings.name,
            "state": str(settings.state),
            "filtered": _sums(_at(body, "totals", "filtered_by_cause")) or "nothing",
            "events by type": _sums(_at(body, "totals", "events_by_type")) or "none yet",
        }
    )
    probes = body.get("probes") or []
    if probes:
        click.echo()
        console.table(
            ["probe", "attached", "reason"],
            [[str(p.get("probe")), "yes" if p.get("attached") else "no", str(p.get("reason", ""))] for p in probes],
        )
    watched = [row for service in body.get("services", []) for row in _at(service, "detail", "binaries") or []]
    if watched:
        click.echo()
        console.table(
            ["watched binary", "mode", "functions", "build-id", "reason"],
            [
                [
                    str(row.get("binary", "?")),
                    str(row.get("mode", "?")),
                    _number(row.get("functions")),
                    str(row.get("build_id", ""))[:16],
                    ", ".join([str(row["reason"])] if row.get("reason") else _left_out(row)),
                ]
                for row in watched
            ],
        )
    shown = ("queues", "latency_ms", "identity", "chain")
    flat = {name: value for key in shown for name, value in _flat(key, body.get(key))}
    for service in body.get("services", []):
        who = f"{service.get('service')}/{service.get('instance')}"
        flat[f"{who} version"] = str(service.get("version"))
        # Probes, binaries and runtimes have their tables above.
        detail = service.get("detail") or {}
        flat.update(_flat(who, {k: v for k, v in detail.items() if k not in ("probes", "binaries", "runtimes")}))
    click.echo()
    _pairs(flat)


def _left_out(row: Mapping[str, Any]) -> list[str]:
    """Return which functions of a watched binary have no probe."""
    return [f"{count} {why} left out" for why, count in (row.get("skipped") or {}).items()]


def stats(settings: Settings, *, memory: bool, as_json: bool) -> None:
    """Print counters and gauges, one a line: name, value, unit.  With `memory`, memory instead."""
    if as_json:
        click.echo(json.dumps([{"name": n, "value": v, "unit": u} for n, v, u in _stats(settings, memory=memory)]))
        return
    click.echo(stats_text(settings, memory=memory), nl=False)


def stats_text(settings: Settings, *, memory: bool) -> str:
    """Return what `stats` prints."""
    return "".join(
        f"{console.printable(name)} {_number(value)} {unit}".rstrip() + "\n"
        for name, value, unit in _stats(settings, memory=memory)
    )


def _stats(settings: Settings, *, memory: bool) -> list[tuple[str, float, str]]:
    body = gateway.get(settings, "/status").json()
    return list(memory_rows(settings, gateway.running_node(settings), body) if memory else _figures(settings, body))


def _figures(settings: Settings, body: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Yield what /metrics shows, instances added up where they count, then latencies."""
    sums: dict[str, tuple[float, str]] = {}
    for name, labels, value in parse_exposition(gateway.get(settings, "/metrics").body.decode()):
        metric = metrics.CATALOGUE.get(name)
        if metric is None or metric.kind == "histogram":
            continue
        alone = metric.kind == "gauge" and "gateway" in metric.producers and "service" in labels
        kept = labels if alone else {k: v for k, v in labels.items() if k not in _OWN_LABELS}
        key = metrics.key(name, **kept)
        sums[key] = (sums.get(key, (0.0, ""))[0] + value, metric.unit)
    for key in sorted(sums):
        yield key, *sums[key]
    for kind, quantiles in (body.get("latency_ms") or {}).items():
        for quantile, milliseconds in quantiles.items():
            if milliseconds is not None:
                yield f"latency_{kind}_{quantile}", float(milliseconds), "milliseconds"


def parse_exposition(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield (name, labels, value) of each sample in the Prometheus text format; other lines are not."""
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        head, _, value = line.rpartition(" ")
        name, brace, inside = head.partition("{")
        labels = {}
        if brace:
            for pair in inside.rstrip("}").split('",'):
                label, _, quoted = pair.partition('="')
                labels[label.strip()] = quoted.rstrip('"')
        try:
            yield name, labels, float(value)
        except ValueError:
            continue


def _at(body: Mapping[str, Any], *path: str) -> Any:
    value: Any = body
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "?"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3f}".rstrip("0").rstrip(".")


def _sums(counts: object) -> str:
    if not isinstance(counts, dict):
        return ""
    return ", ".join(f"{_number(n)} {name}" for name, n in counts.items() if n)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n)[:12] or "0 s"


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every leaf of a JSON value under its path."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix} {key}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, inner in enumerate(value, 1):
            yield from _flat(f"{prefix} {number}", inner)
    elif isinstance(value, float):
        yield prefix, _number(value)
    elif value is not None:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pairs(pairs: Mapping[str, str]) -> None:
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"  {name:<{width}}  {console.printable(value)}")
