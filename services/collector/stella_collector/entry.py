"""The collector's command line."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import anyio
import msgspec

from stella_collector import app, loaded, powers, probe_test, replay
from stella_collector.kernel import OBJECT, ensure_mounts, sha256_of
from stella_collector.libbpf import Libbpf
from stella_shared import allocator, config, log
from stella_shared.errors import StellaError


def main() -> int:
    """Run what the arguments ask for; return the exit code."""
    parser = argparse.ArgumentParser(prog="stella_collector", description="Watches the kernel.")
    parser.add_argument("--config", type=Path, help="configuration file; without it the defaults hold")
    parser.add_argument("--instance", default="", help="accepted for symmetry; a node has one collector")
    parser.add_argument("--test-probes", action="store_true", help="try every probe, print JSON, record nothing")
    parser.add_argument("--format", choices=("json",), default="json", help="format of --test-probes")
    parser.add_argument("--loaded", choices=("list", "detach"), help="print JSON: our programs in this kernel")
    parser.add_argument("--replay", type=Path, help="play recorded ring bytes instead of loading probes")
    parser.add_argument("--versions", action="store_true", help="print JSON: libbpf and the BPF object")
    arguments = parser.parse_args()
    code = 0
    try:
        if arguments.versions:
            print(msgspec.json.encode(versions()).decode())
            return 0
        signals = config.load(arguments.config, os.environ)
        log.setup("collector", signals.logging)
        allocator.keep_large_blocks()
        if arguments.test_probes:
            rows = probe_test.run(signals)
            print(msgspec.json.encode(rows).decode())
            code = probe_test.exit_code(rows)
        elif arguments.loaded:
            print(msgspec.json.encode(loaded.look(signals, detach=arguments.loaded == "detach")).decode())
        elif arguments.replay:
            powers.to_replay(signals)
            anyio.run(replay.serve, signals, arguments.replay)
        else:
            ensure_mounts()
            powers.before_loading(signals)
            anyio.run(app.serve, signals, arguments.config)
    except* StellaError as group:
        error = first(group)
        print(f"Error: {error}" + (f"\nHint: {error.hint}" if error.hint else ""), file=sys.stderr)
        code = error.exit_code
    return code


def versions() -> dict[str, str]:
    """Return what the probes are made of; a part that is not there says so."""
    try:
        libbpf = Libbpf().version
    except StellaError:
        libbpf = "not found"
    digest = sha256_of(OBJECT)
    return {"libbpf": libbpf, "bpf-object": f"sha256:{digest}" if digest else "not built"}


def first(group: BaseExceptionGroup[StellaError]) -> StellaError:
    """Return the first error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, StellaError)
    return error
