"""Output for people: colour and boxes on a terminal, plain lines in a pipe.

rich is loaded by the first that is shown: a supervisor shows nothing of the kind, and lives long.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: Wide enough that no line of a pipe is folded.
_PIPE_COLUMNS = 1000


def out() -> Console:
    """Return a console on stdout."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else _PIPE_COLUMNS, soft_wrap=not terminal)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under headings.  Cells are data, never markup or terminal control."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    sheet = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for column in columns:
        sheet.add_column(column, overflow="fold")
    for row in rows:
        sheet.add_row(*(Text(printable(cell), style=_style(cell)) for cell in row))
    out().print(sheet)


def printable(text: str) -> str:
    """Return `text` with control characters made visible: a file name must not drive the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _style(cell: str) -> str:
    word = cell.split(" ", 1)[0]
    if word in ("ok", "yes", "ready", "healthy", "VALID"):
        return "green"
    if word in ("failed", "no", "unhealthy", "INVALID", "missing"):
        return "red"
    return "yellow" if word in ("degraded", "starting", "stopping", "restarting") else ""
