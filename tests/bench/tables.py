"""The figures as Markdown: for each kind of measurement one table, medians with the least and the most beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

Row = dict[str, Any]
PARTS = ("nats", "collector", "enricher", "signer", "gateway", "supervisor")


def spread(values: Iterable[float], form: str = ",.0f") -> str:
    """Return the median of some runs, and the least and the most of them where they differ."""
    found = sorted(values)
    if not found:
        return "–"
    low, mid, high = (format(value, form) for value in (found[0], median(found), found[-1]))
    return mid if low == high else f"{mid} ({low}–{high})"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _groups(rows: list[Row], key: str) -> dict[Any, list[Row]]:
    out: dict[Any, list[Row]] = {}
    for row in rows:
        out.setdefault(row[key], []).append(row)
    return out


def _by_part(rows: list[Row]) -> str:
    def of(part: str) -> float:
        return median(sum(us for name, us in row["cpu_us"].items() if name.startswith(part)) for row in rows)

    return " / ".join(f"{of(part):.2f}" for part in PARTS)


def _pair(rows: list[Row], key: str) -> str:
    p50 = median(row.get(f"{key}_p50_ms", 0.0) for row in rows)
    return f"{p50:g} / {spread((row.get(f'{key}_p99_ms', 0.0) for row in rows), 'g')}"


def _loss(rows: list[Row]) -> str:
    if wrong := [row for row in rows if not row["exact"]]:
        return f"**does not add up**: {wrong[0]['missing']} {', '.join(wrong[0]['faults'])}"
    causes: dict[str, int] = {}
    for row in rows:
        for cause, n in row["lost_by_cause"].items():
            causes[cause] = causes.get(cause, 0) + n
    return "0" if not causes else ", ".join(f"{n:,} {cause}" for cause, n in sorted(causes.items()))


def machine(facts: Row) -> str:
    """Return the machine in one list."""
    first = facts["page_first_us"]
    return "\n".join(
        [
            f"- {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, Linux {facts['kernel']},"
            f" Python {facts['python']}, {facts['nats_server']}; {facts['date']}",
            f"- one open and close, recorded by nobody: {facts['bare_open_ns']:,} ns",
            f"- touching a page of memory: {facts['page_us']:.2f} µs"
            + (f", the first time since the machine started {first:.2f} µs" if first else ""),
        ]
    )


def rates(rows: list[Row]) -> str:
    """Return the rates that were asked for, and what came of them."""
    head = [
        "asked/s", "held", "made/s", "lost", "line p50 / p99 ms", "durable p50 / p99 ms",
        f"CPU µs/event: {' / '.join(PARTS)}", "all", "memory MB", "bytes/line", "lag s", "cores busy",
    ]  # fmt: skip
    body = []
    for rate, runs in sorted(_groups(rows, "rate").items()):
        body.append([
            f"{rate:,}",
            f"{sum(row['held'] for row in runs)} of {len(runs)}",
            spread(row["made_per_second"] for row in runs),
            _loss(runs),
            _pair(runs, "line"),
            _pair(runs, "durable"),
            _by_part(runs),
            spread((row["cpu_us_total"] for row in runs), ".2f"),
            spread(row["pss_mb_total"] for row in runs),
            spread(row["bytes_per_line"] for row in runs),
            spread((row["lag_seconds"] for row in runs), ".1f"),
            spread((row["busy_cores"] for row in runs), ".2f"),
        ])  # fmt: skip
    return _table(head, body)


def compare(rows: list[Row], versions: dict[str, str]) -> str:
    """Return who slows an unthrottled program down; by how much is against nobody in the same round."""
    alone = {row["round"]: row for row in rows if row["name"] == "nobody" and "cannot" not in row}
    head = [
        "recorded by", "made/s", "delivered/s", "not delivered", "CPU µs/event", "ns an open", "slow-down",
        "program's CPU ns an open", "more CPU",
    ]  # fmt: skip
    body = []
    for name, runs in _groups(rows, "name").items():
        shown = f"{name} ({versions[name]})" if versions.get(name) else name
        good = [row for row in runs if "cannot" not in row]
        if not good:
            body.append([shown, f"cannot run here: {runs[0]['cannot']}", *["–"] * 7])
            continue

        def more(key: str, good: list[Row] = good) -> str:
            values = [(row[key] / alone[row["round"]][key] - 1) * 100 for row in good if row["round"] in alone]
            return f"{spread(values, '+,.0f')} %" if values else "–"

        def of(key: str, form: str = ",.0f", good: list[Row] = good) -> str:
            return spread((row[key] for row in good if key in row), form)

        itself = name == "nobody"
        body.append([
            shown, of("made_per_second"), of("delivered_per_second"), of("missing"), of("cpu_us", ".2f"),
            of("wall_ns"), "–" if itself else more("wall_ns"), of("cpu_ns"), "–" if itself else more("cpu_ns"),
        ])  # fmt: skip
    return _table(head, body)


def idle(found: Row) -> str:
    """Return what each process of an idle node costs."""
    head = ["process", "% of one core", "wakes/s", "memory (PSS) MB", "RSS MB"]
    rows = [
        [name, f"{row['percent']:.2f}", f"{row['wakes_per_second']:.0f}", f"{row['pss']:.1f}", f"{row['rss']:.1f}"]
        for name, row in found["parts"].items()
    ]
    return _table(
        head, [*rows, ["**all**", f"**{found['percent']:.2f}**", "", f"**{found['pss']:.0f}**", f"{found['rss']:.0f}"]]
    )


def mixed(rows: list[Row]) -> str:
    """Return the mixed load's table."""
    head = [
        "asked/s", "events/s", "lost", "line p50 / p99 ms", "durable p50 / p99 ms",
        f"CPU µs/event: {' / '.join(PARTS)}", "all", "the load's own", "memory MB", "lag s", "cores busy",
    ]  # fmt: skip
    body = []
    for asked, runs in sorted(_groups(rows, "asked").items()):
        body.append([
            f"{asked:,}",
            spread(row["events_per_second"] for row in runs),
            _loss(runs),
            _pair(runs, "line"),
            _pair(runs, "durable"),
            _by_part(runs),
            spread((row["cpu_us_total"] for row in runs), ".2f"),
            spread((row["load_cpu_us"] for row in runs), ".2f"),
            spread(row["pss_mb_total"] for row in runs),
            spread((row["lag_seconds"] for row in runs), ".1f"),
            spread((row["busy_cores"] for row in runs), ".2f"),
        ])  # fmt: skip
    kinds = rows[-1]["events"]
    total = sum(kinds.values())
    share = ", ".join(f"{kind} {n / total:.1%}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))
    return f"{_table(head, body)}\n\nOf the last run's events: {share}."


def sections(results: Row) -> dict[str, str]:
    """Return every table that there are figures for, by its name."""
    make: dict[str, Callable[[], str]] = {
        "machine": lambda: machine(results["machine"]),
        "rates": lambda: rates(results["rates"]),
        "compare": lambda: compare(results["compare"], results["versions"]),
        "idle": lambda: idle(results["idle"]),
        "mixed": lambda: mixed(results["mixed"]),
    }
    taken = results.get("taken", {})
    return {
        name: table() + (f"\n\nTaken {taken[name]}" if name in taken else "")
        for name, table in make.items()
        if results.get(name)
    }
