"""`stella config check` and `stella config show`: what is in force, from where, and what is odd about it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from stella_cli import commands
from stella_shared import config


def written(folder: Path, text: str) -> Path:
    path = folder / "stellaops.yaml"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a node around the tests."""
    for name in [name for name in os.environ if name.startswith("STELLA_")]:
        monkeypatch.delenv(name)


def test_a_good_file_is_said_to_be_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 0."""
    path = written(tmp_path, "signals:\n  output_directory: /var/lib/stellaops/evidence\n")
    assert 0 == commands.run(["config", "check", str(path)])
    assert f"{path} can be used\n" == capsys.readouterr().out


def test_every_fault_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2; all faults at once, on stdout, and the sum of them on stderr."""
    path = written(tmp_path, "signals:\n  ring_bufer_size: 4096\n  enrichers: 99\n")
    assert 2 == commands.run(["config", "check", str(path)])
    said = capsys.readouterr()
    assert 2 == said.out.count("Fault: ")
    assert f"{path}:2: unknown key signals.ring_bufer_size; did you mean ring_buffer_size?" in said.out
    assert f"Error: {path} cannot be used: 2 faults" in said.err


def test_what_start_would_refuse_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is written correctly and starts no node is not usable."""
    path = written(tmp_path, "signals:\n  enabled: false\n")
    assert 2 == commands.run(["config", "check", str(path)])
    assert "signals.enabled is false" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, key, words",
    [
        ("  filters: {paths: {allowlist: [/proc/self/**]}}\n", "signals.filters.paths.allowlist", "deny wins"),
        ("  filters: {networks: {allowlist: [127.0.0.1/32]}}\n", "signals.filters.networks.allowlist", "deny wins"),
        ("  output_directory: /tmp/evidence\n", "signals.output_directory", "restart"),
        ("  ring_buffer_size: 4096\n", "signals.ring_buffer_size", "a burst is lost"),
        ("  max_events_per_second: 10\n", "signals.max_events_per_second", "rate_limit"),
        ("  metrics: {address: 0.0.0.0}\n", "signals.metrics.address", "token_file"),
        ("  metrics: {token_file: /nowhere/token}\n", "signals.metrics.token_file", "no file /nowhere/token"),
        ("  bus: {url: 'nats://10.1.2.3:4222'}\n", "signals.bus.url", "in clear"),
        ("  filters: {networks: {denylist: [10.0.0.0/8, 10.0.0.0/8]}}\n", "signals.filters.networks.denylist", "twice"),
    ],
)
def test_what_is_odd_is_warned_of(
    text: str, key: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning names file, line, key and why; the exit code stays 0."""
    path = written(tmp_path, f"signals:\n{text}")
    assert 0 == commands.run(["config", "check", str(path), "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert told["usable"]
    warnings = [w for w in told["warnings"] if w["key"] == key]
    assert words.replace("twice", "2 times") in warnings[0]["message"]
    assert warnings[0]["source"].startswith(f"{path}:")


def test_a_secret_that_others_may_read_is_odd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mode of a token file is looked at."""
    token = tmp_path / "token"
    token.write_text("not shown")
    token.chmod(0o644)
    path = written(tmp_path, f"signals: {{metrics: {{token_file: {token}}}}}\n")
    assert 0 == commands.run(["config", "check", str(path)])
    said = capsys.readouterr().out
    assert "mode 0644" in said
    assert "not shown" not in said


def test_a_file_that_is_not_there_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 4."""
    assert 4 == commands.run(["config", "check", "/nowhere.yaml"])
    assert "no configuration file /nowhere.yaml" in capsys.readouterr().err


def test_each_value_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Default, file and line, environment, option: the last of them wins and is named."""
    path = written(tmp_path, "signals:\n  node: from-file\n  enrichers: 2\n")
    monkeypatch.setenv("STELLA_SIGNALS__ENRICHERS", "3")
    words = ["config", "show", "--effective", "--config", str(path), "--target", str(tmp_path / "evidence")]
    assert 0 == commands.run([*words, "--format", "json"])
    found = {v["key"]: (v["value"], v["source"]) for v in json.loads(capsys.readouterr().out)["values"]}
    assert ("from-file", f"{path}:2") == found["signals.node"]
    assert (3, "environment STELLA_SIGNALS__ENRICHERS") == found["signals.enrichers"]
    assert (str(tmp_path / "evidence"), "option") == found["signals.output_directory"]
    assert (9090, "default") == found["signals.metrics.port"]
    assert {field.key for field in config.declared()} == set(found)


def test_what_is_shown_is_a_configuration_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The YAML loads to the same configuration; without --effective it holds what was set and no more."""
    path = written(tmp_path, "signals:\n  filters:\n    paths: {allowlist: [/srv/**, '/a b/**']}\n  node: 'yes'\n")
    assert 0 == commands.run(["config", "show", "--effective", "--config", str(path)])
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert config.load(path, {}) == config.load(again, {})
    assert 0 == commands.run(["config", "show", "--config", str(path)])
    assert yaml.safe_load(path.read_text()) == yaml.safe_load(capsys.readouterr().out)


def test_a_password_in_a_url_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands before the host is left out, in YAML and JSON."""
    path = written(tmp_path, "signals:\n  symbols: {debuginfod_urls: ['https://me:sesame@debug.example/']}\n")
    for form in ("yaml", "json"):
        assert 0 == commands.run(["config", "show", "--config", str(path), "--format", form])
        said = capsys.readouterr().out
        assert "https://***@debug.example/" in said
        assert "sesame" not in said
