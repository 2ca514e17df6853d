"""`python -m stella_enricher --config FILE [--instance NAME]`."""

import argparse
import os
import sys
from pathlib import Path

import anyio

from stella_enricher import app
from stella_shared import allocator, config, errors, log, privileges, system_calls

parser = argparse.ArgumentParser(prog="stella_enricher", description="Turns raw batches into evidence lines.")
parser.add_argument("--config", type=Path, help="configuration file; without it the defaults hold")
parser.add_argument("--instance", default="", help="name of this instance on the bus")
arguments = parser.parse_args()
code = 0
try:
    signals = config.load(arguments.config, os.environ)
    log.setup("enricher", signals.logging)
    allocator.keep_large_blocks()
    privileges.refuse(system_calls.REFUSED, switched_on=signals.syscall_filter)
    anyio.run(app.serve, signals, arguments.instance)
except* errors.StellaError as group:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, errors.StellaError)
    code = log.fatal(error)
sys.exit(code)
