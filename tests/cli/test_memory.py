"""`stella signals stats --memory`: sizes beside their bounds, in honest units."""

from __future__ import annotations

import os
from pathlib import Path

from stella_cli import memory, process
from stella_cli.settings import Settings
from stella_shared import config


def settings(folder: Path) -> Settings:
    return Settings(None, config.load(None, {}, {"output_directory": str(folder / "evidence")}))


def enricher(instance: str, pid: int, entries: int) -> dict[str, object]:
    caches = {
        "containers": {"entries": entries, "max_entries": 10, "hits": 7, "reasons": {"cgroup_gone": 2}},
        "symbol_tables": {"entries": 1, "bytes": 1000, "max_bytes": 64 << 20},
    }
    return {"service": "enricher", "instance": instance, "pid": pid, "detail": {"caches": caches}}


def test_sizes_stand_beside_their_bounds(tmp_path: Path) -> None:
    """Each cache, the spool, the ring and the stores of the bus; counts that are no sizes are left to `stats`."""
    body = {
        "services": [
            {"service": "collector", "instance": "n", "pid": os.getpid(), "detail": {"spool_bytes": 3}},
            enricher("n-1", os.getpid(), 4),
        ],
        "queues": {"ringbuf_bytes": 4096.0},
    }
    stored = tmp_path / "state" / "nats" / "jetstream" / "node" / "streams" / "STELLA_RAW"
    stored.mkdir(parents=True)
    (stored / "1.blk").write_bytes(b"x" * 8192)
    found = {name: (value, unit) for name, value, unit in memory.rows(settings(tmp_path), None, body)}
    assert (3.0, "bytes") == found["spool_bytes"]
    assert (4.0, "entries") == found["cache_containers_entries"]
    assert (10.0, "entries") == found["cache_containers_max_entries"]
    assert (64 << 20, "bytes") == found["cache_symbol_tables_max_bytes"]
    assert (4096.0, "bytes of kernel memory") == found["ring_bytes"]
    assert found["bus_raw_store_bytes"][0] >= 8192
    assert (1 << 30, "bytes on disk") == found["bus_raw_store_max_bytes"]
    assert not [name for name in found if "hits" in name or "unknown" in name]


def test_two_instances_are_told_apart(tmp_path: Path) -> None:
    """Rows of several enrichers carry their instance."""
    body = {"services": [enricher("n-1", os.getpid(), 4), enricher("n-2", os.getpid(), 5)]}
    found = {name: value for name, value, _ in memory.rows(settings(tmp_path), None, body)}
    assert 4.0 == found["cache_containers_entries{instance=n-1}"]
    assert 5.0 == found["cache_containers_entries{instance=n-2}"]


def test_a_sum_that_lacks_a_part_is_not_shown(tmp_path: Path) -> None:
    """A process that is gone has no PSS, so there is no `pss_all`; resident memory of it is 0."""
    body = {"services": [enricher("n-1", os.getpid(), 4), enricher("n-2", 2**22 + 1, 5)]}
    found = {name: value for name, value, _ in memory.rows(settings(tmp_path), None, body)}
    assert process.pss_bytes(os.getpid())
    assert "pss_all" not in found
    assert 0 == found["rss_enricher/n-2"]
    assert found["rss_all"] > 1 << 20
