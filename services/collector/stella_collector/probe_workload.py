"""`python -m stella_collector.probe_workload CGROUP [LIBSSL]`: makes events on demand, inside a cgroup.

Each line `<kind> <count>` on standard input is done and answered with a line.  Everything stays on this machine:
one file, one small program, one connection over loopback, and TLS calls on an object without a peer, which fail
after the probe has run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

_PROGRAM = "/bin/true"


def main(cgroup: Path, library: str) -> None:
    """Enter the cgroup, then work until standard input ends."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    tls = _tls(library)
    work: dict[str, Callable[[int], None]] = {"open": _open, "exec": _exec, "tcp": _tcp, **tls}
    print("ready", flush=True)
    for line in sys.stdin:
        kind, _, count = line.partition(" ")
        if kind in work:
            work[kind](int(count))
        print("done", flush=True)


def _open(count: int) -> None:
    for _ in range(count):
        os.close(os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC))


def _exec(count: int) -> None:
    for _ in range(count):
        os.waitpid(os.posix_spawn(_PROGRAM, [_PROGRAM], {}), 0)


def _tcp(count: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(count):
            with socket.create_connection(server.getsockname()), server.accept()[0]:
                pass


def _tls(library: str) -> dict[str, Callable[[int], None]]:
    """Return calls of the library's SSL_read and SSL_write; none where it cannot be used so."""
    with contextlib.suppress(OSError, AttributeError):
        lib = ctypes.CDLL(library)
        for name in ("TLS_method", "SSL_CTX_new", "SSL_new"):
            getattr(lib, name).restype = ctypes.c_void_p
        context = lib.SSL_CTX_new(ctypes.c_void_p(lib.TLS_method()))
        ssl = ctypes.c_void_p(lib.SSL_new(ctypes.c_void_p(context)))
        buffer = ctypes.create_string_buffer(64)

        def calls(function: Callable[..., int]) -> Callable[[int], None]:
            def call(count: int) -> None:
                for _ in range(count):
                    function(ssl, buffer, 64)

            return call

        if ssl.value:
            return {"tls_read": calls(lib.SSL_read), "tls_write": calls(lib.SSL_write)}
    return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
