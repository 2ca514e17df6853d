"""The command line: parsing, help, errors, exit codes.  No node runs here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from node_kit import ROOT

from stella_cli import commands, failure, help_pages, settings
from stella_shared import errors
from stella_shared.config import load as load_config

RUNBOOK_COMMANDS = (
    "cleanup",
    "reset-chain",
    "export",
    "manifest",
    "import",
    "init",
    "start",
    "stop",
    "status",
    "health",
    "stats",
    "cache-stats",
    "tail",
    "test-probes",
    "verify-chain",
    "prove",
    "verify-proof",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STELLA_CONFIG", raising=False)
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", tmp_path / "etc" / "stellaops.yaml")


def own_config(folder: Path, text: str = "") -> Path:
    path = folder / "own.yaml"
    path.write_text(
        f"signals:\n  output_directory: {folder}/evidence\n  bus: {{port: 1}}\n  metrics: {{port: 1}}\n{text}"
    )
    return path


def test_every_command_has_a_help_text_with_an_example() -> None:
    """Each help names the command as one would type it."""
    for name in RUNBOOK_COMMANDS:
        result = CliRunner().invoke(commands.stella, ["signals", name, "--help"])
        assert 0 == result.exit_code
        assert f"stella signals {name}" in result.output.split("Options:")[0].split("Usage:")[1]
        assert "Example" in result.output


def test_version_answers_in_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms carry the same facts."""
    assert 0 == commands.run(["version"])
    text = capsys.readouterr().out
    assert 0 == commands.run(["version", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)
    assert [f"{k} {v}" for k, v in facts.items()] == text.splitlines()
    assert ["stella-signals", "libbpf", "bpf-object", "python", "kernel"] == list(facts)
    assert re.fullmatch(r"1\.[0-9]+", facts["libbpf"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", facts["bpf-object"])


def test_version_is_quick() -> None:
    """No bus client, no renderer and no cryptography is loaded for it."""
    code = "import sys, stella_cli.commands as c; c.run(['version']); print(*sorted(sys.modules))"
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - began < 2.0
    assert not {"nats", "rich", "cryptography", "anyio", "yaml", "asyncio"} & set(out.split())


@pytest.mark.parametrize("first", [True, False])
def test_config_is_taken_before_and_after_the_command(first: bool, tmp_path: Path) -> None:
    """`stella --config F signals stop` and `stella signals stop --config F` are the same."""
    path = own_config(tmp_path)
    words = ["--config", str(path), "signals", "stop"] if first else ["signals", "stop", "--config", str(path)]
    assert 4 == commands.run(words)


def test_the_option_after_the_command_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearer word counts."""
    path = own_config(tmp_path)
    assert 4 == commands.run(["--config", "/nowhere.yaml", "signals", "stop", "--config", str(path)])
    assert f"no node runs on {tmp_path / 'state'}" in capsys.readouterr().err


def test_configuration_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given, then $STELLA_CONFIG, then ./stellaops.yaml, then the system's, then none."""
    assert settings.config_path(None, {}) is None
    settings.SYSTEM_CONFIG.parent.mkdir()
    settings.SYSTEM_CONFIG.touch()
    assert settings.SYSTEM_CONFIG == settings.config_path(None, {})
    (tmp_path / "stellaops.yaml").touch()
    assert tmp_path / "stellaops.yaml" == settings.config_path(None, {})
    other = own_config(tmp_path)
    assert other == settings.config_path(None, {"STELLA_CONFIG": str(other)})
    assert tmp_path / "stellaops.yaml" == settings.config_path("stellaops.yaml", {"STELLA_CONFIG": str(other)})


def test_an_error_names_hint_and_runbook_section(capsys: pytest.CaptureFixture[str]) -> None:
    """Error, Hint, See: three lines on stderr, nothing on stdout."""
    assert 4 == commands.run(["signals", "status", "--config", "/nowhere.yaml"])
    said = capsys.readouterr()
    assert "" == said.out
    assert [
        "Error: no configuration file /nowhere.yaml",
        "Hint: make it: stella signals init --config /nowhere.yaml",
        'See: runbook, section "Configuration Reference"',
    ] == said.err.splitlines()


def test_an_error_is_json_when_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stderr, for wrong command lines too."""
    assert 4 == commands.run(["signals", "status", "--format", "json", "--config", "/nowhere.yaml"])
    error = json.loads(capsys.readouterr().err)["error"]
    assert ("NotFound", 4, "Configuration Reference") == (error["kind"], error["exit_code"], error["runbook"])
    assert 2 == commands.run(["signals", "status", "--format=json", "--nonsense"])
    assert 2 == json.loads(capsys.readouterr().err)["error"]["exit_code"]


def test_wrong_use_is_told_with_the_nearest_right_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and where to read on."""
    assert 2 == commands.run(["signals", "statu"])
    said = capsys.readouterr().err
    assert "Error: No such command 'statu'" in said and "Hint: stella signals --help" in said


def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration's own message reaches the terminal; exit code 2."""
    path = own_config(tmp_path, "  ring_bufer_size: 4096\n")
    assert 2 == commands.run(["signals", "status", "--config", str(path)])
    assert "did you mean ring_buffer_size?" in capsys.readouterr().err


def test_an_unforeseen_error_is_one_line_and_a_traceback_only_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """People see what to do; who debugs sees everything."""

    def broken(**_: object) -> None:
        raise ZeroDivisionError("out of reach")

    monkeypatch.setattr("stella_cli.versions.show", broken)
    assert 1 == commands.run(["version"])
    said = capsys.readouterr().err
    assert said.startswith("Error: ZeroDivisionError: out of reach\nHint: this is a fault in stella itself")
    assert "Traceback" not in said
    assert 1 == commands.run(["--debug", "version"])
    assert "Traceback" in capsys.readouterr().err


def test_nothing_runs_is_exit_code_4_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """status, health, stats, stop and tail say so with a clear word."""
    path = own_config(tmp_path)
    for name in ("status", "health", "stats", "cache-stats", "stop", "tail"):
        assert 4 == commands.run(["signals", name, "--config", str(path)]), name
        assert re.match(r"Error: no node (runs|answers)", capsys.readouterr().err), name


def test_an_unknown_event_type_is_refused_with_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest type is named."""
    path = own_config(tmp_path)
    assert 2 == commands.run(["signals", "tail", "--type", "file_opn", "--config", str(path)])
    assert "did you mean file_open?" in capsys.readouterr().err


def test_every_runbook_anchor_of_an_error_is_a_known_section() -> None:
    """`See:` never shows a bare anchor."""
    anchors = {kind.runbook for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "runbook")}
    sources = Path(commands.__file__).parent.glob("*.py")
    for source in sources:
        anchors |= set(re.findall(r'runbook="([a-z-]+)"', source.read_text()))
    assert set() == anchors - {""} - set(failure.RUNBOOK_SECTIONS)


def test_init_writes_a_configuration_that_loads_and_changes_nothing_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file names every key; the evidence lies beside it; the key stays."""
    path = tmp_path / "new folder" / "stellaops.yaml"
    assert 0 == commands.run(["signals", "init", "--config", str(path)])
    first = capsys.readouterr().out
    text = path.read_text()
    signals = load_config(path, {})
    assert str(path.parent / "evidence") == signals.output_directory
    assert load_config(None, {}, {"output_directory": signals.output_directory}) == signals
    key = re.search(r"sha256:[0-9a-f]{64}", first)
    assert key is not None and "(new)" in first and "Next: sudo stella signals start --config" in first
    assert 0 == commands.run(["signals", "init", "--config", str(path)])
    second = capsys.readouterr().out
    assert key[0] in second and "new)" not in second
    assert text == path.read_text()


def test_a_written_configuration_with_every_comment_taken_away_means_the_defaults(tmp_path: Path) -> None:
    """What stands behind # is true."""
    from stella_cli.initialising import config_text

    lines = [re.sub(r"^  # ( *[a-z_]+:)", r"  \1", line) for line in config_text("/x/evidence").splitlines()]
    path = tmp_path / "all.yaml"
    path.write_text("\n".join(lines))
    assert sum(":" in line and not line.lstrip().startswith("#") for line in lines) > 40
    assert load_config(None, {}, {"output_directory": "/x/evidence"}) == load_config(path, {})


def test_verify_chain_shows_the_answer_and_returns_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chain in which nothing is signed yet is not valid: exit code 1 in text and JSON."""
    path = own_config(tmp_path)
    assert 0 == commands.run(["signals", "init", "--config", str(path)])
    capsys.readouterr()
    words = ["signals", "verify-chain", str(tmp_path / "evidence"), "--config", str(path), "--offline"]
    assert 1 == commands.run(words)
    assert capsys.readouterr().out.startswith("Chain Status: ✗ INVALID\n  Error: ")
    assert 1 == commands.run([*words, "--verbose", "--format", "json"])
    report = json.loads(capsys.readouterr().out)
    assert (False, ["unsigned"]) == (report["valid"], [f["code"] for f in report["faults"]])
    (key,) = report["trusted_keys"]
    pem = tmp_path / "evidence" / "keys" / f"{key}.pem"
    assert 1 == commands.run([*words, "--key", str(pem), "--format", "json"])
    assert [key] == json.loads(capsys.readouterr().out)["trusted_keys"]
    assert 4 == commands.run(["signals", "verify-chain", str(tmp_path / "none")])
    assert 4 == commands.run([*words, "--key", "nothing.pem"])


def test_the_reference_page_shows_every_command() -> None:
    """docs/reference/cli.md is made of the help texts and the same each time."""
    page = help_pages.render()
    assert page == (ROOT / "docs" / "reference" / "cli.md").read_text(), "write it again: make reference"
    for name in RUNBOOK_COMMANDS:
        assert f"## `stella signals {name}`" in page
    assert "--ready-fd" not in page


def test_a_reader_that_has_seen_enough_is_no_failure() -> None:
    """`stella --help | head -1` ends quietly with 0."""
    code = "import sys, time, stella_cli.commands as c; time.sleep(0.3); sys.exit(c.run(['version']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"" == process.stderr.read()
        assert 0 == process.wait(10)


def test_test_probes_shows_the_collectors_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is switched off is no failure; one that cannot attach is exit code 1 with its fix."""
    path = own_config(tmp_path)
    on = {"probe": "a", "attach_point": "x", "kernel": True, "permission": True, "attached": True, "reason": ""}
    off = {**on, "probe": "b", "attached": False, "reason": "switched off in the configuration", "fix": ""}
    bad = {**on, "probe": "c", "attached": False, "reason": "no libssl", "fix": "install it"}

    def report(*rows: dict[str, object]) -> int:
        done = subprocess.CompletedProcess([], 0, json.dumps(rows).encode(), b"")
        monkeypatch.setattr("subprocess.run", lambda *_, **__: done)
        return commands.run(["signals", "test-probes", "--config", str(path)])

    assert 0 == report(on, off)
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "yes", "x"]
    assert 1 == report(on, bad)
    assert "Error: 1 of 2 probes do not attach: c\nHint: install it" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_what_completes_our_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script names the program; the answer to it names commands and options."""
    assert 0 == commands.run(["completion", shell])
    script = capsys.readouterr().out
    assert "_STELLA_COMPLETE" in script
    assert f"{shell}_complete" in script


def test_completion_knows_commands_and_options() -> None:
    """`stella signals in<TAB>` offers what begins so, `stella signals inspect --to<TAB>` its option."""
    for words, wanted in (("stella signals in", {"init", "inspect"}), ("stella signals inspect --to", {"--top"})):
        environment = {
            **os.environ,
            "_STELLA_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "stella_cli"], env=environment, capture_output=True, text=True, check=False
        )
        assert wanted == {line.partition(",")[2] for line in done.stdout.splitlines()}
