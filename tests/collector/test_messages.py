"""What the collector says of its troubles, in the runbook's words, with the runbook's section beside them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from stella_cli.failure import RUNBOOK_SECTIONS
from stella_collector.app import Collector
from stella_collector.draining import Draining

WITHOUT_RIGHTS = """
import ctypes, json, logging, os, sys
from stella_collector.kernel import Kernel
from stella_collector.libbpf import Libbpf
from stella_shared import config, log
signals = config.load(None, {}, {"output_directory": sys.argv[1]})
log.setup("collector", signals.logging)
with Kernel(signals, Libbpf(), watch_nothing=True) as kernel:
    # linux/capability.h: _LINUX_CAPABILITY_VERSION_3, then no capability at all
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
    kernel.attach()
    print(json.dumps([[s.name, s.permission, s.reason, s.fix] for s in kernel.states]))
"""


@pytest.mark.kernel
def test_a_probe_that_may_not_attach_says_so_in_the_runbooks_words(tmp_path: Path) -> None:
    """`Failed to attach tracepoint/syscalls/sys_enter_openat: permission denied`, with fix and section."""
    command = [sys.executable, "-c", WITHOUT_RIGHTS, str(tmp_path / "evidence")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    states = {name: (permission, reason, fix) for name, permission, reason, fix in json.loads(done.stdout)}
    message = "Failed to attach tracepoint/syscalls/sys_enter_openat: permission denied"
    assert (False, message) == states["sys_enter_openat"][:2]
    assert "CAP_BPF" in states["sys_enter_openat"][2]
    said = [json.loads(line) for line in done.stderr.splitlines() if message in line]
    assert [("error", "sys_enter_openat")] == [(line["level"], line["probe"]) for line in said]
    assert "Issue: Probe Failed to Attach" == RUNBOOK_SECTIONS[said[0]["runbook"]]


def test_drops_are_told_at_most_every_five_seconds_and_none_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    """`Ring buffer full, N events dropped`, N being all since the last time; the end tells what is left."""
    collector = Collector.__new__(Collector)
    collector.draining = Draining.__new__(Draining)
    collector.draining.lost = {}
    collector._drops_told, collector._drops_untold_since = 0, 0.0
    with caplog.at_level(logging.WARNING):
        for now, dropped in ((10.0, 1523), (11.0, 1600), (14.9, 1700), (15.0, 1800), (16.0, 1801)):
            collector.draining.lost["ring_full"] = dropped
            collector._warn_of_drops(now)
        collector._warn_of_drops(float("inf"))
    said = [record.getMessage() for record in caplog.records]
    assert [f"Ring buffer full, {n} events dropped" for n in (1523, 277, 1)] == said
    assert {"Issue: Ring Buffer Overflow"} == {RUNBOOK_SECTIONS[vars(r)["runbook"]] for r in caplog.records}
    assert 1801 == sum(vars(record)["dropped"] for record in caplog.records)
