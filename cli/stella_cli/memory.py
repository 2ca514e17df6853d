"""`stella signals stats --memory`: what the node's parts hold in memory and on disk, each beside its bound.

Resident memory counts a page once in every process that maps it; the proportional figure (PSS) shares it out, so
only PSS adds up to what the node really takes.  PSS needs the right to look into a process: its owner, or root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from stella_cli import caches, process
from stella_cli.node_file import NodeFile
from stella_cli.settings import Settings
from stella_shared import config, subjects

Row = tuple[str, float, str]

_BYTES: Final = "bytes"
_ON_DISK: Final = "bytes on disk"
#: What of a heartbeat's numbers are sizes: their last word, and the unit.
_SIZES: Final = {"bytes": _BYTES, "entries": "entries"}
_STREAMS: Final = (
    ("raw", subjects.RAW_STREAM, subjects.RAW_MAX_BYTES),
    ("enriched", subjects.ENRICHED_STREAM, subjects.ENRICHED_MAX_BYTES),
)


def rows(settings: Settings, node: NodeFile | None, body: Mapping[str, Any]) -> Iterator[Row]:
    """Yield (name, value, unit): each process, then ring, spool, caches, and what lies on disk.

    A size that has a bound is followed by it, as `…_max_…`.  What cannot be read is not there.
    """
    if node is not None:
        pids = {"supervisor": node.who.pid, **{child.name: child.who.pid for child in node.children}}
    else:
        pids = {f"{s['service']}/{s['instance']}": int(s["pid"]) for s in body.get("services", [])}
    yield from _processes(pids)
    services = body.get("services", [])
    several = {s["service"] for s in services if [o["service"] for o in services].count(s["service"]) > 1}
    for service in services:
        label = f"{{instance={service['instance']}}}" if service["service"] in several else ""
        for name, value, unit in _service(str(service["service"]), service.get("detail") or {}):
            yield name + label, value, unit
    yield from _ring(body)
    yield from _disk(settings)


def _processes(pids: Mapping[str, int]) -> Iterator[Row]:
    resident = {name: process.rss_bytes(pid) for name, pid in pids.items()}
    shared_out = {name: process.pss_bytes(pid) for name, pid in pids.items()}
    for name, size in resident.items():
        yield f"rss_{name}", size, _BYTES
    yield "rss_all", sum(resident.values()), _BYTES
    for name, pss in shared_out.items():
        if pss is not None:
            yield f"pss_{name}", pss, _BYTES
    # A sum that lacks a part would say less than is taken.
    if all(pss is not None for pss in shared_out.values()):
        yield "pss_all", sum(pss or 0 for pss in shared_out.values()), _BYTES


def _ring(body: Mapping[str, Any]) -> Iterator[Row]:
    size = (body.get("queues") or {}).get("ringbuf_bytes")
    if size is not None:
        yield "ring_bytes", float(size), "bytes of kernel memory"


def _service(service: str, detail: Mapping[str, Any]) -> Iterator[Row]:
    if service == "collector" and "spool_bytes" in detail:
        yield "spool_bytes", float(detail["spool_bytes"]), _BYTES
        if "spool_max_bytes" in detail:
            yield "spool_max_bytes", float(detail["spool_max_bytes"]), _BYTES
    for cache, content in caches.of_service(detail):
        for name, value in content.items():
            unit = _SIZES.get(str(name).rpartition("_")[2])
            if unit and isinstance(value, int | float):
                yield f"cache_{cache}_{name}", float(value), unit


def _disk(settings: Settings) -> Iterator[Row]:
    store = settings.state / "nats" / "jetstream"
    if not settings.signals.bus.url and os.access(store, os.R_OK | os.X_OK):
        for short, stream, bound in _STREAMS:
            yield f"bus_{short}_store_bytes", sum(map(_disk_bytes, store.glob(f"*/streams/{stream}"))), _ON_DISK
            yield f"bus_{short}_store_max_bytes", bound, _ON_DISK
    tables = config.symbols_directory(settings.signals)
    if os.access(tables, os.R_OK | os.X_OK):
        yield "symbols_store_bytes", _disk_bytes(tables), _ON_DISK
        yield "symbols_store_max_bytes", settings.signals.symbols.store_max_mb << 20, _ON_DISK


def _disk_bytes(folder: Path) -> int:
    """Return the blocks that the files below a folder take; what goes away meanwhile is not counted."""
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total
