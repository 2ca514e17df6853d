"""The generated pages in docs/reference."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from stella_cli import reference
from stella_shared import config, metrics
from stella_shared.wire import FILTER_CAUSES, LOSS_CAUSES

RUNBOOK_EXAMPLE = Path(__file__).with_name("runbook-example.yaml").read_text()
FOLDER = Path(__file__).parents[2] / "docs" / "reference"
RUNBOOK_METRICS = (
    "events_total",
    "events_rate",
    "ringbuf_usage",
    "drops_total",
    "enrich_latency_p99",
    "chunks_signed",
    "rekor_failures",
)


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_no_page_is_stale(name: str) -> None:
    """Each page is what its declarations make of it now; `python -m stella_cli.reference docs/reference`."""
    path = FOLDER / name
    assert path.exists(), f"{name} is missing: python -m stella_cli.reference docs/reference"
    assert reference.pages()[name] == path.read_text("utf-8"), (
        f"docs/reference/{name} is stale: python -m stella_cli.reference docs/reference"
    )


def test_the_program_writes_every_page(tmp_path: Path) -> None:
    """Run as a program it fills the folder it is given, and says how when it is given none."""
    assert 0 == reference.main([str(tmp_path / "new")])
    assert set(reference.pages()) == {path.name for path in (tmp_path / "new").iterdir()}
    assert 2 == reference.main([])


def test_every_key_metric_and_cause_stands_in_its_page() -> None:
    """Nothing that is declared is left out of the reference."""
    pages = reference.pages()
    for field in config.declared():
        assert f"### `{field.key}`" in pages["configuration.md"]
        assert config.env_name(field.key) in pages["configuration.md"]
    for name in [*metrics.CATALOGUE, *LOSS_CAUSES, *FILTER_CAUSES]:
        assert f"| `{name}` |" in pages["metrics.md"]


def test_the_configuration_schema_accepts_the_runbook_and_refuses_typos() -> None:
    """Editors that use the schema judge as the program does."""
    schema = reference.configuration_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    example = yaml.safe_load(RUNBOOK_EXAMPLE)
    assert validator.is_valid(example)
    example["signals"]["ring_bufer_size"] = 1
    assert not validator.is_valid(example)


def test_the_evidence_schema_is_a_schema() -> None:
    """The evidence line's schema in the tree is valid JSON Schema 2020-12."""
    schema = json.loads((FOLDER / "evidence-line.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", RUNBOOK_METRICS)
def test_the_runbooks_metrics_are_in_the_catalogue(name: str) -> None:
    """The seven names of the runbook's table exist exactly so."""
    assert f"stellaops_signals_{name}" in metrics.CATALOGUE


def test_metric_keys_carry_labels_there_and_back() -> None:
    """A labelled value's key is read as it was written; a hostile label value cannot break the form."""
    key = metrics.key(metrics.DROPS_TOTAL, cause="ring_full")
    assert "stellaops_signals_drops_total{cause=ring_full}" == key
    assert (metrics.DROPS_TOTAL, {"cause": "ring_full"}) == metrics.parse_key(key)
    assert {"cause": "a_b__c"} == metrics.parse_key(metrics.key(metrics.DROPS_TOTAL, cause='a,b="c'))[1]
    assert (metrics.CHUNKS_SIGNED, {}) == metrics.parse_key(metrics.CHUNKS_SIGNED)
    for text in ("", "A{", "a{b}", "a{b=c,}", "a{b=c}d", "x y"):
        with pytest.raises(ValueError, match="is not a metric key"):
            metrics.parse_key(text)
