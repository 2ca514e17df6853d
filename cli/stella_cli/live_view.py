"""`stella signals top`: what the node does, now, on one screen.

    ask the gateway → a frame (pure: `frame`) → draw it → wait for a key or the next look

A node that goes away is said to be away; the last numbers stay, and looking goes on.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stella_cli import console, gateway
from stella_cli.settings import Settings
from stella_shared.errors import StellaError

_BARS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN_COLUMNS: Final = 100
_HISTORY: Final = 60
#: Of the containers that the gateway tells of.
CONTAINERS_SHOWN: Final = 8
_COLOURS: Final = {"ok": "green", "degraded": "yellow", "starting": "yellow", "stopping": "yellow"}


def run(settings: Settings, *, once: bool, interval_seconds: float) -> None:
    """Show the node until `q`; with `once`, and where stdout is no terminal, print a single frame.

    Raises what `gateway.get` raises when the first look fails and there is nothing to show yet.
    """
    body = gateway.get(settings, "/status").json()
    terminal = sys.stdout.isatty()
    if once or not terminal:
        out = Console(highlight=False, width=None if terminal else _PLAIN_COLUMNS)
        out.print(frame(body, "", out.width))
        return
    out = Console(highlight=False)
    with _keys() as pressed, _screen(out) as live:
        live.update(frame(body, "", out.width), refresh=True)
        while not pressed(interval_seconds):
            away = ""
            try:
                body = gateway.get(settings, "/status").json()
            except StellaError as e:
                away = str(e)
            live.update(frame(body, away, out.width), refresh=True)


def _screen(out: Console) -> Live:
    return Live(console=out, screen=True, auto_refresh=False, vertical_overflow="crop")


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Give a function that waits for seconds and says whether to end: `q`, Ctrl-C, Ctrl-D or the end of stdin."""
    fd = sys.stdin.fileno() if sys.stdin.isatty() else -1

    def pressed(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                if fd < 0:
                    time.sleep(left)
                elif select.select([fd], [], [], left)[0]:
                    return os.read(fd, 1) in (b"q", b"Q", b"\x03", b"\x04", b"")
            except InterruptedError:
                continue  # the terminal has another size
            except KeyboardInterrupt:
                return True
        return False

    if fd < 0:
        yield pressed
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


# ---- one frame


def frame(body: Mapping[str, Any], away: str, width: int) -> RenderableType:
    """Return the screen for a /status body, `width` columns wide.

    `away` says why there is no newer body; "" when this one is of now.
    """
    status = "AWAY" if away else str(body.get("status", "?"))
    head = Text.assemble(
        ("stella ", "bold"),
        console.printable(str(body.get("node", ""))),
        "  ",
        (status, "bold red" if away else _COLOURS.get(status, "bold red")),
        f"  {str(body.get('at', ''))[11:19]} UTC",
        ("   q quits", "dim"),
    )
    parts: list[RenderableType] = [head]
    if away:
        parts.append(Text(f"The node does not answer: {console.printable(away)}. What is shown is old.", "bold red"))
    panels = [_rates(body), _queues(body), _chain(body), _losses(body)]
    beside = 4 if width >= 140 else 2 if width >= 76 else 1
    grid = Table.grid(expand=True)
    for _ in range(beside):
        grid.add_column(ratio=1)
    for start in range(0, len(panels), beside):
        grid.add_row(*panels[start : start + beside])
    parts.append(grid)
    if containers := _containers(body):
        parts.append(containers)
    parts.append(_services(body))
    if probes := _probes(body):
        parts.append(probes)
    return Group(*parts)


def _panel(title: str, rows: Sequence[tuple[str, RenderableType]]) -> Panel:
    sheet = Table.grid(padding=(0, 1), expand=True)
    sheet.add_column(style="dim", no_wrap=True)
    sheet.add_column(justify="right")
    for name, value in rows:
        sheet.add_row(console.printable(name), value)
    return Panel(sheet, title=title, title_align="left", box=ROUNDED, padding=(0, 1))


def _rates(body: Mapping[str, Any]) -> Panel:
    rates = body.get("rates") or {}
    total = rates.get("events_per_second")
    rows: list[tuple[str, RenderableType]] = [("from the kernel", Text(number(total), "bold"))]
    by_type = rates.get("by_type_per_second") or {}
    rows += [(name, number(rate)) for name, rate in sorted(by_type.items(), key=lambda item: -item[1])]
    history = list(rates.get("history_events_per_second") or [])
    rows.append(("", Text(sparkline(history[-24:]), "cyan")))
    return _panel("events per second", rows)


def _queues(body: Mapping[str, Any]) -> Panel:
    queues, latency = body.get("queues") or {}, body.get("latency_ms") or {}
    used = queues.get("ringbuf_usage_percent")
    rows: list[tuple[str, RenderableType]] = [
        ("ring", Text(f"{bar(used)} {number(used)} %", "red" if (used or 0) > 80 else "")),
        ("ring size", size(queues.get("ringbuf_bytes"))),
        ("collector's spool", size(queues.get("spool_bytes"))),
        ("raw on the bus", size((queues.get("bus_waiting_bytes") or {}).get("raw"))),
        ("enriched on the bus", size((queues.get("bus_waiting_bytes") or {}).get("enriched"))),
        ("not on disk yet", f"{number(queues.get('sign_lag_batches'))} batches"),
    ]
    for name, quantiles in latency.items():
        milliseconds = [number(quantiles.get(q)) for q in ("p50", "p99")]
        rows.append((f"{name.replace('_', ' ')} p50/p99", f"{milliseconds[0]} / {milliseconds[1]} ms"))
    return _panel("queues", rows)


def _chain(body: Mapping[str, Any]) -> Panel:
    chain, totals = body.get("chain") or {}, body.get("totals") or {}
    failures = totals.get("rekor_failures")
    rows: list[tuple[str, RenderableType]] = [
        ("open chunk", number(chain.get("index"))),
        ("its lines", number(chain.get("open_lines"))),
        ("its size", size(chain.get("open_bytes"))),
        ("chunks signed", number(totals.get("chunks_signed"))),
        ("lines recorded", number(totals.get("lines"))),
        ("wait for the log", number(totals.get("rekor_pending"))),
        ("log failures", Text(number(failures), "red" if failures else "")),
    ]
    return _panel("chain", rows)


def _losses(body: Mapping[str, Any]) -> Panel:
    totals, rates = body.get("totals") or {}, body.get("rates") or {}
    lost = {cause: n for cause, n in (totals.get("lost_by_cause") or {}).items() if n}
    rows: list[tuple[str, RenderableType]] = [(cause, Text(number(n), "bold red")) for cause, n in lost.items()]
    if not lost:
        rows.append(("lost", Text("nothing", "green")))
    history = list(rates.get("history_lost_per_second") or [])
    recent = sum(history[-_HISTORY:])
    rows.append(("in the last minute", Text(number(recent), "red" if recent else "")))
    filtered = {cause: n for cause, n in (totals.get("filtered_by_cause") or {}).items() if n}
    rows += [(f"filtered {cause}", number(n)) for cause, n in filtered.items()]
    return _panel("drops", rows)


def _containers(body: Mapping[str, Any]) -> Table | None:
    """Return the containers with the most lines; None where the enrichers tell of none."""
    rows = list((body.get("rates") or {}).get("by_container_per_second") or [])[:CONTAINERS_SHOWN]
    if not rows:
        return None
    sheet = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    sheet.add_column("container", no_wrap=True)
    sheet.add_column("image", no_wrap=True, ratio=1)
    sheet.add_column("lines/s", justify="right", no_wrap=True)
    for row in rows:
        runtime, mark, number_ = str(row.get("container")).partition("://")
        name = f"{runtime}://{number_[:12]}" if mark else runtime
        image = console.printable(str(row.get("image") or "–"))
        sheet.add_row(console.printable(name), image, number(row.get("lines_per_second")))
    return sheet


def _services(body: Mapping[str, Any]) -> Table:
    sheet = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for name in ("service", "state", "pid", "up", "reason"):
        sheet.add_column(name, no_wrap=name != "reason", ratio=1 if name == "reason" else None)
    for service in body.get("services") or []:
        state = str(service.get("state"))
        sheet.add_row(
            console.printable(f"{service.get('service')} {service.get('instance')}"),
            Text(state, _COLOURS.get(state, "red")),
            str(service.get("pid")),
            duration(time.time() - float(service.get("started_at") or time.time())),
            console.printable(str(service.get("reason") or "")),
        )
    return sheet


def _probes(body: Mapping[str, Any]) -> Text | None:
    probes = body.get("probes") or []
    if not probes:
        return None
    told = Text("probes  ", "dim")
    for probe in probes:
        attached, wanted = probe.get("attached"), probe.get("wanted", True)
        mark, style = ("●", "green") if attached else ("○", "yellow" if wanted else "dim")
        told.append(f"{mark} {console.printable(str(probe.get('probe')))}  ", style)
    return told


def number(value: object) -> str:
    """Return a number for people: digits in groups, one decimal below 100; `–` for what is not known."""
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.1f}"


def size(value: object) -> str:
    """Return bytes in the largest unit that keeps a digit before the point."""
    if not isinstance(value, int | float):
        return "–"
    left = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if left < 1024:
            return f"{number(round(left, 1))} {unit}"
        left /= 1024
    return f"{number(round(left, 1))} TiB"


def duration(seconds: float) -> str:
    """Return a span of time in its largest unit that makes sense."""
    seconds = max(0, int(seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def bar(percent: object, width: int = 10) -> str:
    """Return a bar of blocks for a percentage."""
    share = min(100.0, max(0.0, float(percent))) if isinstance(percent, int | float) else 0.0
    full = round(share * width / 100)
    return "█" * full + "░" * (width - full)


def sparkline(values: Sequence[float]) -> str:
    """Return a line of blocks, the highest value a full one."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[1] * len(values)
    return "".join(_BARS[1 + round((len(_BARS) - 2) * max(0.0, value) / top)] for value in values)
