"""`python -m stella_enricher --config FILE [--instance NAME]`."""

import argparse
import os
from pathlib import Path

import anyio

from stella_enricher import app
from stella_shared import allocator, config, log

parser = argparse.ArgumentParser(prog="stella_enricher", description="Turns raw batches into evidence lines.")
parser.add_argument("--config", type=Path, help="configuration file; without it the defaults hold")
parser.add_argument("--instance", default="", help="name of this instance on the bus")
arguments = parser.parse_args()
signals = config.load(arguments.config, os.environ)
log.setup("enricher", signals.logging)
allocator.keep_large_blocks()
anyio.run(app.serve, signals, arguments.instance)
