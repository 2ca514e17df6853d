"""One evidence line as a row for people.  Pure: bytes in, cells out.

The row shows a selection; the line is the evidence.
"""

from __future__ import annotations

import errno
import json
import time
from typing import Any, Final

from stella_cli.console import printable

#: Heading and width of each column; the last takes the rest.
COLUMNS: Final = (("TIME", 12), ("TYPE", 13), ("PID", 8), ("COMM", 16), ("CONTAINER", 24), ("WHAT", 0))


def heading() -> str:
    """Return the headings, spaced like the rows."""
    return _spaced([name for name, _ in COLUMNS])


def row(line: bytes, boot_unix_ns: int) -> str:
    """Return one evidence line as one text line.  `boot_unix_ns` is the Unix time at which `ts_ns` was 0."""
    try:
        record = json.loads(line)
        event = record["event"]
        seconds, ns = divmod(boot_unix_ns + int(record["ts_ns"]), 1_000_000_000)
        cells = [
            time.strftime("%H:%M:%S", time.localtime(seconds)) + f".{ns // 1_000_000:03d}",
            str(event["type"]),
            str(record.get("pid", "-")),
            str(record.get("comm", "-")),
            _container(str(record.get("container_id") or "-")),
            what(event),
        ]
    except (ValueError, KeyError, TypeError):
        return printable(line.decode(errors="replace"))
    return _spaced([printable(cell) for cell in cells])


def what(event: dict[str, Any]) -> str:
    """Say in a few words what an event is about."""
    get = event.get
    match get("type"):
        case "file_open":
            return f"{get('access', 'open')} {get('path', '?')} {_result(get('result'))}"
        case "process_exec":
            argv = get("argv") or []
            return f"{get('filename', '?')} {' '.join(str(a) for a in argv[1:])}".rstrip()
        case "tcp_state":
            ends = [_end(get(f"{side}_address"), get(f"{side}_port")) for side in ("source", "destination")]
            return f"{ends[0]} → {ends[1]} {get('old_state', '?')} → {get('new_state', '?')}"
        case "net_connect":
            return f"{get('direction', '?')} {_end(get('address'), get('port'))} {_result(get('result'))}"
        case "ssl_op":
            return f"{get('direction', '?')} {get('bytes', '?')} bytes, {get('library', '?')}"
        case "function_call":
            return _call(event)
        case "throttle":
            whose = "each container" if get("scope") == "cgroup" else "the node"
            cost = f", {get('dropped')} dropped" if get("state") == "stop" else ""
            return f"{get('state', '?')} of the limit of {whose}: {get('limit_per_second', '?')}/s{cost}"
        case _:
            return json.dumps({k: v for k, v in event.items() if k != "type"}, ensure_ascii=False)


def _call(event: dict[str, Any]) -> str:
    """Return the function, how often where it is counted, the file, and who called it where that is known."""
    text = f"{event.get('symbol', '?')}"
    if event.get("count"):
        text += f" ×{event['count']}"
    text += f" in {event.get('binary', '?')}"
    callers = [frame.get("symbol") or _place(frame) for frame in (event.get("stack") or [])[1:]]
    return f"{text} ← {' ← '.join(callers)}" if callers else text


def _place(frame: dict[str, Any]) -> str:
    return f"{str(frame.get('build_id', '?'))[:8]}+0x{int(frame.get('offset') or 0):x}"


def _end(address: object, port: object) -> str:
    host = "?" if address is None else str(address)
    if port is None:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _result(result: object) -> str:
    if isinstance(result, int) and result < 0:
        return f"→ {errno.errorcode.get(-result, str(result))}"
    return f"→ {result}" if result is not None else ""


def _container(text: str) -> str:
    runtime, mark, name = text.partition("://")
    return f"{runtime}://{name[:12]}" if mark else text


def _spaced(cells: list[str]) -> str:
    parts = [
        cell if not width else (cell if len(cell) <= width else cell[: width - 1] + "…").ljust(width)
        for cell, (_, width) in zip(cells, COLUMNS, strict=True)
    ]
    return " ".join(parts).rstrip()
