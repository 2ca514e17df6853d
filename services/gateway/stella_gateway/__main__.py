"""`python -m stella_gateway --config FILE [--instance NAME]`."""

import argparse
import os
import sys
from pathlib import Path

import anyio

from stella_gateway import app
from stella_shared import config, errors, log, privileges, system_calls

parser = argparse.ArgumentParser("stella_gateway", description="Tells over HTTP how the node is.")
parser.add_argument("--config", type=Path, help="configuration file (default: built-in defaults)")
parser.add_argument("--instance", default="", help="name on the bus (default: the node's)")
arguments = parser.parse_args()
try:
    signals = config.load(arguments.config, os.environ)
    privileges.refuse(system_calls.REFUSED, switched_on=signals.syscall_filter)
    anyio.run(app.run, signals, arguments.instance)
except errors.StellaError as error:
    sys.exit(log.fatal(error))
