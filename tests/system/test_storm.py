"""A storm of short programs, no two alike: the node's memory stays within what is configured, and nothing is lost.

Each program is a file of its own with a build-id of its own, each start has arguments of its own, and they come from
as many containers' cgroups as there are programs for each.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stella_collector.naming import MAX_BYTES
from stella_shared import subjects
from stella_shared.allocator import KEEP_BYTES
from tests.system.node import HERE, Node, running

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

STARTS = 24_000
PROGRAMS = 3_000
CONTAINERS = 400
CACHE_MB = 8
MIB = 1 << 20
#: What the parts may take beyond what they take at rest: their caches, the batches that are under way, and what the
#: allocator keeps for the next ones.
BOUNDS = {
    "enricher-1": CACHE_MB * MIB + KEEP_BYTES + 3 * subjects.MAX_PAYLOAD_BYTES,
    "collector": MAX_BYTES + KEEP_BYTES,
}
BUILD_ID = hashlib.sha1(b"the first", usedforsecurity=False)
#: A program that ends at once, without a library.
TINY = """
__attribute__((naked)) void _start(void)
{
#if defined(__x86_64__)
	__asm__("mov $60, %eax; xor %edi, %edi; syscall");
#else
	__asm__("mov x8, #93; mov x0, #0; svc #0");
#endif
}
"""


def programs(folder: Path) -> Iterator[Path]:
    """Make the programs: copies of one, each with another build-id in its note."""
    source, first = folder / "tiny.c", folder / "tiny"
    source.write_text(TINY)
    flags = ("-O1", "-static", "-nostdlib", f"-Wl,--build-id=0x{BUILD_ID.hexdigest()}", "-Wl,-z,noseparate-code")
    subprocess.run(["cc", *flags, "-o", first, source], check=True)
    image = first.read_bytes()
    assert 1 == image.count(BUILD_ID.digest())
    for i in range(PROGRAMS):
        program = folder / f"program-{i:05d}"
        other = hashlib.sha1(b"%d" % i, usedforsecurity=False).digest()
        program.write_bytes(image.replace(BUILD_ID.digest(), other))
        program.chmod(0o755)
        yield program


def peak_bytes(pid: int) -> int:
    """Return the most memory that a process has had resident."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["VmHWM"].split()[0]) << 10


def storm(node: Node, folder: Path) -> list[str]:
    """Run it, in containers' cgroups below the node's; return the containers' ids."""
    subprocess.run(["cc", "-O2", "-o", folder / "storm", HERE / "storm.c"], check=True)
    ids = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(CONTAINERS)]
    containers = [node.cgroup.path / f"docker-{container}.scope" for container in ids]
    for container in containers:
        container.mkdir()
    try:
        rows = [*map(str, programs(folder)), "", *(f"{container}/cgroup.procs" for container in containers)]
        (folder / "list").write_text("\n".join(rows) + "\n")
        process = node.cgroup.run(
            folder / "storm", folder / "list", str(STARTS), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        said, _ = process.communicate(b"go\n", timeout=180)
        assert (0, b"ready\ndone\n") == (process.returncode, said)
    finally:
        for container in containers:
            container.rmdir()
    return ids


def test_memory_stays_within_what_is_configured_and_every_start_is_recorded(tmp_path: Path) -> None:
    """Caches within their bounds, as the commands show them; no part over its bound; all starts are there, named."""
    off = dict.fromkeys(("sys_enter_openat", "inet_sock_set_state", "libc_connect", "libc_accept"), False)
    off |= dict.fromkeys(("openssl_read", "openssl_write"), False)
    settings = {"probes": off, "resources": {"max_cache_memory_mb": CACHE_MB}, "ring_buffer_size": 16 * MIB}
    with running(tmp_path / "node", "storm", **settings) as node:
        pids = node.pids()
        rest = {name: peak_bytes(pid) for name, pid in pids.items()}
        (tmp_path / "work").mkdir()
        containers = storm(node, tmp_path / "work")
        caches = json.loads(node.stella("cache-stats", "--format", "json").stdout)["caches"]
        shown = dict(row.split(maxsplit=1) for row in node.stella("stats", "--memory").stdout.splitlines())
        peaks = {name: peak_bytes(pid) for name, pid in pids.items()}
        node.stop()
    for name, bound in BOUNDS.items():
        assert peaks[name] <= rest[name] + bound, (name, rest, peaks)
    by_name = {cache["cache"]: cache for cache in caches}
    assert {"containers", "events", "places", "arguments", "cgroups", "programs"} <= set(by_name)
    for name, cache in by_name.items():
        for unit in ("entries", "bytes"):
            if f"max_{unit}" in cache:
                assert cache[unit] <= cache[f"max_{unit}"], cache
                assert f"{cache[f'max_{unit}']} " in shown[f"cache_{name}_max_{unit}"]
    assert sum(cache.get("max_bytes", 0) for cache in caches if cache["service"] == "enricher") <= CACHE_MB * MIB
    assert by_name["containers"]["entries"] > CONTAINERS * 0.9

    report = node.verify()
    assert ([], True) == (report.faults, report.valid)
    starts = [line for line in node.lines() if line["event"]["type"] == "process_exec"]
    lost = report.totals.lost
    assert report.totals.produced == report.totals.recorded + report.totals.filtered + lost
    ours = [line for line in starts if line["event"]["filename"].startswith(str(tmp_path / "work/program-"))]
    # What is not there stands in the ledger, and the ring had room for all of it.
    assert (STARTS, 0) == (len(ours), lost), report.lost_by_cause
    assert STARTS == len({line["event"]["argv"][1] for line in ours})
    assert PROGRAMS == len({line["exe"] for line in ours})
    assert {f"docker://{container}" for container in containers} == {line["container_id"] for line in ours}
