"""`stella signals top`: one frame for a pipe, a live screen on a terminal, and a node that goes away."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chain_kit import environment
from node_kit import free_port
from rich.console import Console

from stella_cli import live_view

BODY: dict[str, Any] = {
    "at": "2026-01-28T02:30:48.000000000Z",
    "status": "ok",
    "node": "web-1\x1b[2J",
    "rates": {
        "events_per_second": 1234.5,
        "by_type_per_second": {"file_open": 1200.0, "process_exec": 34.5},
        "by_container_per_second": [
            {"container": "docker://" + "ab" * 32, "image": "shop/till:3\x1b[2J", "lines_per_second": 1200.0},
            {"container": "host", "image": "", "lines_per_second": 34.5},
        ],
        "history_events_per_second": [0.0, 10.0, 20.0, 1234.5],
        "history_lost_per_second": [0.0, 3.0],
    },
    "queues": {
        "ringbuf_usage_percent": 85.0,
        "ringbuf_bytes": 262144.0,
        "spool_bytes": 0.0,
        "bus_waiting_bytes": {"raw": 0.0, "enriched": 4096.0},
        "sign_lag_batches": 2.0,
    },
    "latency_ms": {"enrich": {"p50": 1.0, "p99": 5.0}, "durable": {"p50": None, "p99": None}},
    "totals": {
        "lost_by_cause": {"ring_full": 3.0},
        "filtered_by_cause": {"kernel_target": 9.0},
        "chunks_signed": 41.0,
        "lines": 1000000.0,
        "rekor_pending": 7.0,
        "rekor_failures": 1.0,
    },
    "chain": {"index": 42, "open_lines": 17, "open_bytes": 2048},
    "probes": [{"probe": "libc_connect", "attached": True}, {"probe": "openssl_read", "attached": False}],
    "services": [
        {"service": "signer", "instance": "web-1", "state": "degraded", "pid": 7, "started_at": 0, "reason": "log away"}
    ],
}


class Gateway:
    """An HTTP server that answers /status, and can go away and come back on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                data = json.dumps(BODY).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    made.start()
    yield made
    made.stop()


def command(folder: Path, gateway: Gateway, *words: str) -> list[str]:
    config = folder / "stellaops.yaml"
    config.write_text(f"signals: {{output_directory: {folder}/evidence, metrics: {{port: {gateway.port}}}}}\n")
    return [sys.executable, "-m", "stella_cli", "signals", "top", "--config", str(config), *words]


def drawn(width: int, away: str = "", body: dict[str, Any] = BODY) -> str:
    out = Console(width=width, highlight=False, color_system=None)
    with out.capture() as captured:
        out.print(live_view.frame(body, away, width))
    return captured.get()


def test_a_frame_has_the_loudest_containers() -> None:
    """By name, with the image where it is known; nothing of it can steer the terminal; without any, no table."""
    text = drawn(100)
    assert re.search(r"docker://abababababab +shop/till:3.*1,200", text), text
    assert re.search(r"host +– +34\.5", text), text
    assert "\x1b[2J" not in text
    quiet = {**BODY, "rates": {**BODY["rates"], "by_container_per_second": []}}
    assert "lines/s" in text
    assert "lines/s" not in drawn(100, body=quiet)


def test_a_frame_has_rates_ring_drops_queues_chain_and_log() -> None:
    """Everything an operator looks at first stands on one screen."""
    said = drawn(100)
    for words in ("1,234", "file_open", "85 %", "256 KiB", "2 batches", "ring_full", "open chunk", "42", "1 / 5 ms"):
        assert words in said
    assert "wait for the log" in said
    assert "log away" in said
    assert "● libc_connect" in said
    assert "○ openssl_read" in said


@pytest.mark.parametrize("width", [40, 80, 100, 160])
def test_a_frame_fits_any_width(width: int) -> None:
    """No line is longer than the terminal, on a phone's terminal too."""
    assert all(len(line) <= width for line in drawn(width, "gone").splitlines())


def test_nothing_of_the_node_drives_the_terminal() -> None:
    """Control characters in names are shown, not sent."""
    assert "\x1b[2J" not in drawn(100)
    assert r"web-1\x1b[2J" in drawn(100)


def test_an_empty_status_is_drawn_too() -> None:
    """A gateway that knows nothing yet gives dashes."""
    out = Console(width=80)
    with out.capture() as captured:
        out.print(live_view.frame({"node": "n"}, "", 80))
    assert "–" in captured.get()


def test_once_prints_one_frame(tmp_path: Path, gateway: Gateway) -> None:
    """For pipes: no control sequences, exit code 0."""
    done = subprocess.run(
        command(tmp_path, gateway, "--once"), env=environment(), capture_output=True, text=True, check=False, timeout=30
    )
    assert 0 == done.returncode, done.stderr
    assert "file_open" in done.stdout
    assert "\x1b" not in done.stdout


def test_nothing_that_runs_is_not_found(tmp_path: Path, gateway: Gateway) -> None:
    """Exit code 4, said clearly."""
    gateway.stop()
    done = subprocess.run(
        command(tmp_path, gateway), env=environment(), capture_output=True, text=True, check=False, timeout=30
    )
    assert 4 == done.returncode
    assert f"no node answers at http://127.0.0.1:{gateway.port}" in done.stderr


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, words: list[str]) -> None:
        self.fd, inner = pty.openpty()
        self.resize(30, 100, None)
        self.process = subprocess.Popen(
            words, stdin=inner, stdout=inner, stderr=inner, env={**environment(), "TERM": "xterm"}, close_fds=True
        )
        os.close(inner)
        self.said = b""

    def resize(self, rows: int, columns: int, number: int | None) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if number is not None:
            self.process.send_signal(number)

    def wait_for(self, words: bytes, seconds: float = 20.0) -> bytes:
        """Return what was written up to `words`, after what was taken before."""
        deadline = time.monotonic() + seconds
        while words not in self.said:
            assert time.monotonic() < deadline, self.said[-2000:]
            if select.select([self.fd], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.said += os.read(self.fd, 65536)
        taken, _, self.said = self.said.partition(words)
        return taken

    def key(self, key: bytes) -> None:
        os.write(self.fd, key)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.fd)


def test_the_screen_lives_through_a_node_that_goes_and_comes(tmp_path: Path, gateway: Gateway) -> None:
    """AWAY with the reason while nobody answers, the node again when it is back, other sizes, q ends it with 0."""
    terminal = Terminal(command(tmp_path, gateway, "--interval", "0.2"))
    try:
        terminal.wait_for(b"file_open")
        gateway.stop()
        terminal.wait_for(b"AWAY")
        terminal.wait_for(b"What is shown is old.")
        gateway.start()
        terminal.wait_for(b"\x1b[32mok")
        terminal.resize(12, 44, 28)  # SIGWINCH
        terminal.wait_for(b"file_open")
        terminal.wait_for(b"file_open")
        assert terminal.process.poll() is None
        terminal.key(b"q")
        while terminal.process.poll() is None:
            with contextlib.suppress(OSError):
                os.read(terminal.fd, 65536)
        assert 0 == terminal.process.returncode
    finally:
        terminal.close()


@pytest.mark.parametrize(
    "value, text", [(0, "0 B"), (1023, "1,023 B"), (2048, "2 KiB"), (1.5 * 2**30, "1.5 GiB"), (None, "–")]
)
def test_sizes_read_well(value: float | None, text: str) -> None:
    """Binary units, a dash for what is not known."""
    assert text == live_view.size(value)


def test_a_sparkline_is_as_long_as_its_values() -> None:
    """The highest is a full block; nothing at all is a low line."""
    assert "▁▅█" == live_view.sparkline([0, 50, 100])
    assert "▁▁" == live_view.sparkline([0, 0])
    assert "" == live_view.sparkline([])
