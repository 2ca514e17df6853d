"""Clock, log and lifecycle: what every service shares."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import cast

import anyio
import pytest

from stella_shared import clock, lifecycle
from stella_shared.bus import Bus
from stella_shared.wire import Beat


def run_logging(code: str, **environ: str) -> list[str]:
    """Run `code` in a process of its own with `logger` set up, and return what it wrote to standard error."""
    program = "import sys, logging\nfrom stella_shared import log, config\n" + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environ}
    done = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, env=environment, check=True, timeout=20
    )
    return done.stderr.decode().splitlines()


def test_utc_text_has_nine_digits() -> None:
    """Nanoseconds are kept to the last digit, before 1970 too."""
    assert "2026-01-28T00:30:48.000000001Z" == clock.utc_text(1769560248_000000001)
    assert "1969-12-31T23:59:59.999999999Z" == clock.utc_text(-1)


def test_the_boot_has_a_name_and_a_clock() -> None:
    """The boot id is 32 hex digits; the boot clock is the kernel's own."""
    assert 32 == len(clock.boot_id())
    int(clock.boot_id(), 16)
    assert abs(clock.boottime_ns() / 1e9 - float(Path("/proc/uptime").read_text().split()[0])) < 1


def test_json_logging_is_one_object_a_line_whatever_it_is_given() -> None:
    """Newlines, odd objects, lone surrogates and tracebacks stay inside one JSON object each."""
    lines = run_logging(
        """
        logger = log.setup("collector", config.Logging(level="info", format="json"))
        logger.debug("not shown")
        logger.warning("Ring buffer full, %d events dropped", 1523, extra={"dropped": 1523, "what": {1}})
        logger.error("two\\nlines \\ud800")
        logger.info("x" * 50000)
        try:
            1 / 0
        except ZeroDivisionError:
            logger.exception("broken")
        """
    )
    records = [json.loads(line) for line in lines]
    assert ["warning", "error", "info", "error"] == [r["level"] for r in records]
    assert ("Ring buffer full, 1523 events dropped", 1523, "{1}") == (
        records[0]["message"],
        records[0]["dropped"],
        records[0]["what"],
    )
    assert "collector" == records[0]["service"]
    assert "ZeroDivisionError" in records[3]["traceback"]
    assert all(len(line) < 20000 for line in lines)


def test_text_logging_cannot_forge_lines_or_colours() -> None:
    """In text form a message's second line is indented and control characters are replaced."""
    lines = run_logging(
        """
        logger = log.setup("signer", config.Logging(level="info", format="text"))
        logger.info("one\\n2026 error forged \\x1b[31m", extra={"n": 1})
        """
    )
    assert lines[0].endswith("info    signer one")
    assert "    2026 error forged \ufffd[31m n=1" == lines[1]


def test_the_journal_gets_priorities(tmp_path: Path) -> None:
    """When standard error is the journal's, `journalctl -p err` can tell lines apart."""
    path = tmp_path / "err"
    with path.open("wb") as err:
        status = os.fstat(err.fileno())
        code = (
            "from stella_shared import log, config\n"
            "log.setup('x', config.Logging(format='text')).error('bad')\n"
            "log.setup('x', config.Logging(format='text')).info('good')\n"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        }
        subprocess.run([sys.executable, "-c", code], stderr=err, env=environment, check=True, timeout=20)
    assert ["<3>", "<6>"] == [line[:3] for line in path.read_text().splitlines()]


@pytest.mark.anyio
async def test_the_first_signal_stops_and_further_ones_change_nothing() -> None:
    """SIGTERM sets the event; SIGINT after it is swallowed; afterwards the former handling is back."""
    former = signal.getsignal(signal.SIGTERM)
    with lifecycle.stop_event() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        with anyio.fail_after(2):
            await stop.wait()
        await anyio.sleep(0.05)
    assert former == signal.getsignal(signal.SIGTERM)


@pytest.mark.anyio
async def test_a_signal_cancels_a_scope() -> None:
    """`until_signalled` ends the work it was given by cancelling it."""
    with anyio.fail_after(2):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lifecycle.until_signalled, tasks.cancel_scope)
            await anyio.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
            await anyio.sleep_forever()


@pytest.mark.anyio
async def test_beating_ends_with_a_farewell() -> None:
    """A beat comes at once, and the last one says stopping."""
    heard: list[Beat] = []

    class Recorder:
        async def beat(self, beat: Beat) -> None:
            heard.append(beat)

    def make_beat() -> Beat:
        return Beat("signer", "n", "n", 1, "0", time.time(), 0.0, "ok")

    stop = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lifecycle.beating, cast(Bus, Recorder()), make_beat, stop)
        await anyio.sleep(0.05)
        assert ["ok"] == [b.state for b in heard]
        stop.set()
    assert ["ok", "stopping"] == [b.state for b in heard]
