"""httpx, without the command line that it brings along where rich and click are installed too.

That is 5 MB of a service's memory, for a function `main` that none of ours calls.
"""

import sys

# Python's own way to say that a module is not to be had; httpx then goes without it.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]

import httpx as httpx  # noqa: E402, PLC0414
