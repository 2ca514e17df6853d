"""`signals.probes.functions`: what is accepted, and which mistake is named how."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stella_shared import config
from stella_shared.config import Signals, WatchedFunctions
from stella_shared.errors import ConfigError

GOOD = {"binary": "/usr/lib/**/libcrypto.so.3", "functions": ["EVP_*"]}


def loaded(tmp_path: Path, *entries: Any) -> Signals:
    """Load a configuration with these entries."""
    path = tmp_path / "stellaops.yaml"
    path.write_text(yaml.safe_dump({"signals": {"probes": {"functions": list(entries)}}}))
    return config.load(path, {})


def test_an_entry_has_defaults(tmp_path: Path) -> None:
    """Binary and functions are asked for; mode, stack and image have defaults."""
    (entry,) = loaded(tmp_path, GOOD).probes.functions
    assert WatchedFunctions(**GOOD, mode="trace", stack=True, image="") == entry


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"binary": "libcrypto.so.3"}, "[0].binary is 'libcrypto.so.3': a path pattern begins with /"),
        ({"binary": "build-id:XY"}, "[0].binary is 'build-id:XY'; allowed: build-id: and 1 to 32 bytes in lower-case"),
        ({"binary": 7}, "[0].binary: expected `str`, got `int`"),
        ({"functions": []}, "[0].functions: expected `array` of length >= 1"),
        ({"functions": ["a\0b"]}, "[0].functions has 'a\\x00b'; allowed: printable text"),
        ({"functions": ["x" * 513]}, "[0].functions[0]: expected `str` of length <= 512"),
        ({"mode": "profile"}, "[0].mode: invalid enum value 'profile'"),
        ({"image": "a\nb"}, "[0].image is 'a\\nb'; allowed: printable text"),
        ({"function": ["x"]}, "unknown key signals.probes.functions[0].function; did you mean functions?"),
    ],
)
def test_a_mistake_names_entry_and_key(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    """The place within the list is part of the message."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, {**GOOD, **wrong})
    assert said in str(caught.value)


@pytest.mark.parametrize("value", ["EVP_*", ["EVP_*"], {"binary": "/x"}])
def test_what_is_no_list_of_mappings_is_refused(tmp_path: Path, value: Any) -> None:
    """Text, a list of text, one mapping: the message says what is allowed."""
    path = tmp_path / "stellaops.yaml"
    path.write_text(yaml.safe_dump({"signals": {"probes": {"functions": value}}}))
    with pytest.raises(ConfigError, match="allowed: a list of mappings with the keys binary, functions"):
        config.load(path, {})


def test_there_are_64_entries_at_most(tmp_path: Path) -> None:
    """One more is refused."""
    assert 64 == len(loaded(tmp_path, *[deepcopy(GOOD) for _ in range(64)]).probes.functions)
    with pytest.raises(ConfigError, match="length <= 64"):
        loaded(tmp_path, *[deepcopy(GOOD) for _ in range(65)])


def test_entries_can_come_from_the_environment() -> None:
    """As YAML, for a list of mappings has no commas to split at."""
    name = config.env_name("signals.probes.functions")
    signals = config.load(None, {name: "[{binary: /bin/true, functions: [main], mode: count}]"})
    assert ["count"] == [entry.mode for entry in signals.probes.functions]
