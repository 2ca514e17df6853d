"""The benchmark's parts in a tiny form: they run, they add up, and they say so when something does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import compare, idle, load, measure, mixed, rates, tables
from tests.bench.__main__ import main, put_into
from tests.system.node import build_generator, running

pytestmark = pytest.mark.kernel

SETTLE_SECONDS = 0.3

FACTS: dict[str, Any] = {
    "processor": "a processor", "cores": 2, "memory_gib": 4.0, "kernel": "6.1", "python": "3.11", "date": "2026-01-01",
    "nats_server": "nats-server 2.15", "bare_open_ns": 1000, "page_us": 1.0, "page_first_us": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that opens."""
    return build_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SETTLE_SECONDS", SETTLE_SECONDS)
    monkeypatch.setattr(mixed, "SETTLE_SECONDS", SETTLE_SECONDS)


def test_a_node_is_watched_idle_and_then_loaded_and_its_evidence_adds_up(program: Path, tmp_path: Path) -> None:
    """Idle figures name each process; every open of a rate is a line; one open too many is found missing."""
    with running(tmp_path / "node", "tiny") as node:
        quiet = idle.watch(node, 0.5)
        assert {"supervisor", "nats", "enricher-1", "signer", "collector", "gateway"} == set(quiet["parts"])
        assert quiet["pss"] > 20
        row = {"round": 0, **rates.on(node, program, 4000, 1.0, producers=2)}
        assert (4000, {"opens": 4000 + rates.WARM + 3 * load.FILES}) == (row["count"], row["lines"])
        assert ([], {}, True, True) == (row["faults"], row["missing"], row["valid"], row["exact"])
        assert 0 < row["line_p50_ms"] <= row["line_p99_ms"]
        wrong = measure.outcome(node, {"opens": (load.MARKER, row["lines"]["opens"] + 1)})
        assert ({"opens": 1}, False) == (wrong["missing"], wrong["exact"]), "nothing was lost that could explain it"
    sections = tables.sections({"machine": FACTS, "idle": quiet, "rates": [row]})
    assert "| 4,000 | 1 of 1 |" in sections["rates"] or "| 4,000 | 0 of 1 |" in sections["rates"]
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- bench rates -->\nold\n<!-- /bench -->\nafter\n<!-- bench mixed -->\nkept\n<!-- /bench -->\n"
    )
    put_into(document, sections)
    text = document.read_text()
    assert "old" not in text and "kept" in text and sections["rates"] in text


def test_the_mixed_load_is_recorded_to_the_last_event() -> None:
    """Opens, program starts, both sides of connections, TLS reads and writes: as many lines as were made."""
    plan = mixed.Plan(1500, 1.0, containers=3, processes=6, execs=12, connections=24, tls_records=40)
    row = {"round": 0, **mixed.run(plan, 1 << 20)}
    assert row["made"] == row["lines"] and row["exact"], row
    assert all(n > 0 for n in row["made"].values()), row["made"]
    assert "tcp_state" in tables.mixed([row])


def test_a_reader_that_only_drains_has_every_record(program: Path) -> None:
    """The C reader delivers what was made or the kernel's counters have lost; the table sets it against nobody."""
    rows = [{"round": 0, **compare.run(program, name, 1 << 20, 0.01)} for name in ("nobody", "C reader, drains only")]
    alone, drained = rows
    assert "delivered_per_second" not in alone
    assert drained["missing"] <= drained["lost_reported"]
    assert "| nobody |" in tables.compare(rows, {})


def test_a_peer_that_cannot_run_says_why_in_the_table(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is a row with the reason."""
    monkeypatch.setenv("PATH", str(program.parent))
    row = compare.run(program, "bpftrace", 1 << 20, 0.01)
    assert {"name": "bpftrace", "cannot": "bpftrace is not installed"} == row
    assert "cannot run here: bpftrace is not installed" in tables.compare([row], {})


def test_a_run_that_fails_is_told_and_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others' figures are printed and kept, the reason stands below them, and the exit code is 1."""
    runs = iter([RuntimeError("no node"), {"name": "nobody", "made_per_second": 5, "wall_ns": 2, "cpu_ns": 1}])

    def run(*_: Any) -> dict[str, Any]:
        if isinstance(outcome := next(runs), Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(compare, "run", run)
    kept = tmp_path / "figures.json"
    words = ["compare", "--quick", "--runs", "2", "--recorders", "nobody", "--touch-gib", "0", "--json", str(kept)]
    assert 1 == main(words)
    shown = capsys.readouterr().out
    assert "| nobody | 5 |" in shown and "failed: compare: RuntimeError: no node" in shown
    assert [1] == [row["round"] for row in json.loads(kept.read_text())["compare"]]
