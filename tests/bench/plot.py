"""Draws rates against loss and latency, as an SVG file that is the same for the same figures."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

LINES = (
    ("line_p50_ms", "kernel → line, p50", "tab:blue", "--"),
    ("line_p99_ms", "kernel → line, p99", "tab:blue", "-"),
    ("durable_p50_ms", "kernel → fsync'd chunk, p50", "tab:orange", "--"),
    ("durable_p99_ms", "kernel → fsync'd chunk, p99", "tab:orange", "-"),
)


def draw(rows: list[dict[str, Any]], to: Path, about: str) -> None:
    """Draw the runs of `rates`: medians as lines, each run as a dot."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "stella", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 2))
    rates = sorted({row["rate"] for row in rows})

    def series(axis: Any, key: str, label: str, color: str, style: str) -> None:
        values = [[row[key] for row in rows if row["rate"] == rate] for rate in rates]
        axis.plot(rates, [median(group) for group in values], style, color=color, label=label)
        for rate, group in zip(rates, values, strict=True):
            axis.plot([rate] * len(group), group, ".", color=color, alpha=0.5)

    for key, label, color, style in LINES:
        series(above, key, label, color, style)
    above.set_yscale("log")
    above.set_ylabel("ms (upper bounds)")
    above.legend(fontsize=8)
    above.set_title(about, fontsize=9)
    shares = [
        {"rate": row["rate"], "lost": 100 * row["lost"] / row["count"],
         "short": max(0.0, 100 - 100 * row["made_per_second"] / row["rate"])}
        for row in rows
    ]  # fmt: skip
    rows = shares
    series(below, "lost", "lost, % of what was made", "tab:red", "-")
    series(below, "short", "not made, % of what was asked for", "tab:gray", "-")
    below.set_ylim(bottom=-1)
    below.set_ylabel("%")
    below.set_xlabel("opens a second that were asked for, by one program")
    below.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f},000" if value else "0")
    below.legend(fontsize=8)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(to, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    # matplotlib leaves blanks at the ends of lines.
    to.write_text("".join(f"{line.rstrip()}\n" for line in to.read_text().splitlines()))
