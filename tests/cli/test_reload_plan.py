"""Which changes a running node can take up, and by which of its parts."""

from __future__ import annotations

import pytest

from stella_cli import reload_plan
from stella_shared import config
from stella_shared.config import Signals
from stella_shared.errors import ConfigError


def with_keys(**keys: object) -> Signals:
    """Return a configuration with these keys, written with __ for the dot."""
    return config.load(None, {}, {key.replace("__", "."): value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("keys", "changed", "parts"),
    [
        ({}, [], []),
        ({"max_events_per_second": 5}, ["max_events_per_second"], ["collector"]),
        ({"filters__paths__denylist": ["/x/**"]}, ["filters.paths.denylist"], ["collector", "enricher"]),
        ({"filters__networks__denylist": []}, ["filters.networks.denylist"], ["collector"]),
        ({"redaction__enabled": False}, ["redaction.enabled"], ["enricher"]),
        ({"rotation__max_age_hours": 2}, ["rotation.max_age_hours"], ["signer"]),
        ({"logging__level": "debug"}, ["logging.level"], ["collector", "enricher", "signer", "gateway"]),
        (
            {"rotation__max_size_mb": 7, "filters__target_cgroups": ["/a"]},
            ["filters.target_cgroups", "rotation.max_size_mb"],
            ["collector", "signer"],
        ),
    ],
)
def test_each_key_is_taken_up_by_those_who_use_it(
    keys: dict[str, object], changed: list[str], parts: list[str]
) -> None:
    """The keys that differ are named, and the parts in the order in which they take them up."""
    assert changed == reload_plan.changed(with_keys(), with_keys(**keys))
    assert parts == reload_plan.takers(changed)


def test_what_holds_for_a_nodes_life_is_refused_as_a_whole() -> None:
    """Each key that cannot change is named; one that could does not help it."""
    keys = reload_plan.changed(
        with_keys(), with_keys(node="other", probes__openssl_read=False, rotation__max_size_mb=7, bus__port=9)
    )
    with pytest.raises(ConfigError) as refused:
        reload_plan.takers(keys)
    text = str(refused.value)
    assert all(f"signals.{key}" in text for key in ("node", "probes.openssl_read", "bus.port"))
    assert "rotation" not in text


def test_every_rule_is_about_a_key_that_there_is() -> None:
    """No rule names a key, or the begin of keys, that the configuration does not have."""
    declared = [field.key.removeprefix("signals.") for field in config.declared()]
    for rule in reload_plan.TAKERS:
        assert any(key == rule or key.startswith(f"{rule}.") for key in declared), rule
