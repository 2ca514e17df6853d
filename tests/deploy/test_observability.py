"""Alerts and dashboards ask for metrics that exist, and Prometheus itself finds the rules right."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stella_shared import metrics
from tests.deploy import engine
from tests.docs.test_docs import headings

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "stella.rules.yaml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
OWN_LABELS = {"service", "instance", "job", "le"}


def rules() -> list[dict[str, Any]]:
    """Return every alert rule."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Return every panel of every dashboard."""
    return [panel for path in DASHBOARDS for panel in json.loads(path.read_text())["panels"]]


def queries() -> list[tuple[str, str]]:
    """Return (where, query) of all rules and dashboards."""
    found = [(str(rule["alert"]), str(rule["expr"])) for rule in rules()]
    return found + [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


@pytest.mark.parametrize(("where", "query"), queries())
def test_a_query_names_metrics_and_labels_of_the_catalogue(where: str, query: str) -> None:
    """A metric that was renamed takes its alerts and panels along; a histogram is asked by its series."""
    names = re.findall(r"stellaops_signals_\w+", query)
    assert names or query.startswith("up{"), where
    for name in names:
        series = re.fullmatch(r"(.+?)_(?:bucket|count|sum)", name)
        histogram = series is not None and series[1] in metrics.CATALOGUE
        metric = metrics.CATALOGUE[series[1] if series and histogram else name]
        assert histogram == (metric.kind == "histogram"), name
        labels = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", query)) | {
            label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r"[, ]+", group)
        }
        assert labels <= OWN_LABELS | set(metric.labels), (where, labels)


def test_every_threshold_of_the_catalogue_has_its_alert() -> None:
    """What the metrics reference says to watch is watched, at the same number."""
    for metric in metrics.CATALOGUE.values():
        if not metric.alert:
            continue
        watching = [rule["expr"] for rule in rules() if metric.name in rule["expr"]]
        assert watching, f"no alert watches {metric.name}: {metric.alert}"
        if limit := re.match(r"> (\d+)", metric.alert):
            assert any(f"> {limit[1]}" in expression for expression in watching), metric.name


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    """Whoever is woken up finds what to do."""
    found = headings(ROOT / "docs" / "runbook.md")
    for rule in rules():
        page, _, section = rule["annotations"]["runbook"].partition("#")
        assert "docs/runbook.md" == page
        assert section in found, rule["alert"]
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}


def test_dashboards_stand_alone() -> None:
    """Panels have ids of their own, do not overlap, and ask the provisioned data source."""
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    (uid,) = {row["uid"] for row in source["datasources"]}
    assert DASHBOARDS
    for path in DASHBOARDS:
        rows = json.loads(path.read_text())["panels"]
        assert len(rows) == len({row["id"] for row in rows})
        taken: set[tuple[int, int]] = set()
        for row in rows:
            at = row["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not taken & cells, row["title"]
            taken |= cells
            assert {uid} == {target["datasource"]["uid"] for target in row["targets"]}


@pytest.fixture(scope="module")
def promtool() -> Path:
    """Prometheus's checker."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("promtool comes from Debian's package: it needs apt-get, as root")
    return engine.promtool()


def test_prometheus_takes_rules_and_queries(promtool: Path, tmp_path: Path) -> None:
    """promtool reads the configuration and the rules, and each panel's query as a rule of its own."""
    shutil.copytree(RULES.parent, tmp_path / "prometheus")
    shown = tmp_path / "prometheus" / "prometheus.yaml"
    token = tmp_path / "token"
    token.write_text("0" * 16)
    shown.write_text(shown.read_text().replace("/run/secrets/gateway/token", str(token)))
    assert f"{len(rules())} rules found" in engine.run(promtool, "check", "config", shown)
    asked = [
        {"record": f"panel:query_{i}", "expr": query.replace("$__rate_interval", "1m")}
        for i, (_, query) in enumerate(queries())
    ]
    as_rules = tmp_path / "panels.yaml"
    as_rules.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    assert f"{len(asked)} rules found" in engine.run(promtool, "check", "rules", as_rules)


def test_alerts_are_raised_when_they_should_be_and_not_otherwise(promtool: Path, tmp_path: Path) -> None:
    """promtool plays series through the rules; see alerts.test.yaml."""
    cases = tmp_path / "alerts.test.yaml"
    cases.write_text(Path(__file__).with_name("alerts.test.yaml").read_text().replace("RULES", str(RULES)))
    assert "SUCCESS" in engine.run(promtool, "test", "rules", cases)
