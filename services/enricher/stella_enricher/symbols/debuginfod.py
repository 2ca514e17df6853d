"""Asks debuginfod servers for files by build-id.  The only module that speaks to them; off without a URL.

What they send is as hostile as any file: bounded in bytes and time here, read in the child process like the rest,
and only used when its own build-id is the one asked for.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Final, Literal

from stella_shared.http_library import httpx

log = logging.getLogger(__name__)

BYTES_MAX: Final = 512 << 20
SECONDS_MAX: Final = 60.0
_IDLE_SECONDS: Final = 10.0


def fetch(
    urls: Sequence[str],
    build_id: str,
    kind: Literal["executable", "debuginfo"],
    *,
    bytes_max: int = BYTES_MAX,
    seconds_max: float = SECONDS_MAX,
) -> IO[bytes] | None:
    """Return an open, unnamed file with what the first server that has it sends, or None.  Blocks."""
    deadline = time.monotonic() + seconds_max
    for url in urls:
        file = tempfile.TemporaryFile(prefix="stella-debuginfod-")  # noqa: SIM115  # the caller closes it
        try:
            if _fetch_into(file, f"{url.rstrip('/')}/buildid/{build_id}/{kind}", bytes_max, deadline):
                file.flush()
                return file
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as e:
            log.warning("debuginfod %s: %s of %s: %s", url, kind, build_id, str(e) or type(e).__name__)
        file.close()
    return None


def _fetch_into(file: IO[bytes], url: str, bytes_max: int, deadline: float) -> bool:
    size = 0
    with (
        httpx.Client(timeout=_IDLE_SECONDS, follow_redirects=False, trust_env=False) as client,
        client.stream("GET", url) as response,
    ):
        if response.status_code != httpx.codes.OK:
            return False
        for piece in response.iter_bytes(1 << 16):
            size += len(piece)
            if size > bytes_max or time.monotonic() > deadline:
                log.warning("debuginfod %s: given up after %d bytes", url, size)
                return False
            file.write(piece)
    return size > 0
