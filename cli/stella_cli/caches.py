"""`stella signals cache-stats`, and the runtimes in `status`: what the services remember and whom they ask."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from stella_cli import console, gateway
from stella_cli.settings import Settings

#: What a cache may say of itself, beside `reasons`.
_FIGURES = ("entries", "max_entries", "bytes", "max_bytes", "hits", "misses", "pushed_out")


def run(settings: Settings, *, as_json: bool) -> None:
    """Print each cache of the node: entries, bound, hit rate, memory, and what it could not find with reasons."""
    body = gateway.get(settings, "/status").json()
    caches = list(found(body))
    if as_json:
        click.echo(json.dumps({"node": body["node"], "caches": caches}, ensure_ascii=False))
        return
    console.table(
        ["service", "cache", "entries", "bound", "hit rate", "memory", "unknown"],
        [
            [
                f"{cache['service']}/{cache['instance']}",
                str(cache["cache"]),
                str(cache.get("entries", "?")),
                _bound(cache),
                "-" if cache["hit_rate"] is None else f"{100 * cache['hit_rate']:.1f} %",
                size(cache["bytes"]) if "bytes" in cache else "-",
                ", ".join(f"{count} {reason}" for reason, count in cache["reasons"].items()) or "-",
            ]
            for cache in caches
        ],
    )


def found(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the caches that the services of a /status tell of."""
    for service in body.get("services", []):
        for name, said in of_service(service.get("detail") or {}):
            figures = {key: said[key] for key in _FIGURES if isinstance(said.get(key), int | float)}
            asked = figures.get("hits", 0) + figures.get("misses", 0)
            yield {
                "service": service.get("service"),
                "instance": service.get("instance"),
                "cache": name,
                **figures,
                "hit_rate": round(figures.get("hits", 0) / asked, 4) if asked else None,
                "reasons": dict(said.get("reasons") or {}),
            }


def of_service(detail: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the figures of each cache that a heartbeat tells of: `caches`, and the collector's `names`."""
    for place in ("caches", "names"):
        said = detail.get(place)
        for name, figures in (said if isinstance(said, dict) else {}).items():
            if isinstance(figures, dict) and "entries" in figures:
                yield str(name), figures


def runtimes(body: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each socket of a container runtime: runtime, API, socket, state, last answer, calls, failures.

    Enrichers that ask the same socket stand in rows of their own.
    """
    rows = []
    for service in body.get("services", []):
        for runtime in (service.get("detail") or {}).get("runtimes") or []:
            failures = runtime.get("failures") or {}
            said = ", ".join(f"{count} {reason}" for reason, count in failures.items())
            answered = float(runtime.get("last_answer_at") or 0)
            rows.append(
                [
                    str(runtime.get("runtime")),
                    str(runtime.get("api")),
                    str(runtime.get("socket")),
                    str(runtime.get("state")),
                    f"{max(0.0, time.time() - answered):.0f} s ago" if answered else "never",
                    str(runtime.get("calls")),
                    said or "none",
                    str(runtime.get("reason") or ""),
                ]
            )
    return rows


RUNTIME_COLUMNS = ("runtime", "api", "socket", "state", "last answer", "calls", "failures", "reason")


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _bound(cache: Mapping[str, Any]) -> str:
    bounds = []
    if "max_entries" in cache:
        bounds.append(f"{cache['max_entries']} entries")
    if "max_bytes" in cache:
        bounds.append(size(cache["max_bytes"]))
    return ", ".join(bounds) or "-"
