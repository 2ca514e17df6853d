"""What the documents say exists: paths, links, functions, commands, keys, metrics, sections."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from stella_cli import commands, failure
from stella_shared import config, metrics

ROOT = Path(__file__).parents[2]
ROOMS = ("bpf/", "cli/", "deploy/", "docs/", "services/", "shared/", "tests/")
ROOT_FILES = {p.name for p in ROOT.iterdir() if p.is_file()}
PAGES = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("services/*/README.md")}
    | {ROOT / room / "README.md" for room in ("bpf", "cli", "shared")}
)
RUNBOOK = ROOT / "docs" / "runbook.md"
LATER = "## Commands of later releases"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
RECORD_PARTS = ("Context", "Decision", "What it costs")
SOURCES = [p for room in ("cli", "services", "shared") for p in (ROOT / room).glob("**/*.py")]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


@cache
def text_of(page: Path) -> str:
    """Return a page's text."""
    return page.read_text(encoding="utf-8")


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of each fenced block."""
    for match in re.finditer(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", text_of(page), re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^[ ]*```.*?^[ ]*```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Return what stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower())
    return kept.replace(" ", "-")


def headings(page: Path) -> dict[str, str]:
    """Return anchor → heading of a page."""
    found = re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE)
    return {anchor(heading): heading for heading in found}


def paths(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, name or "") of each repository path in backticks: `a/b.py`, `a/*.py`, `a/b.py:Class.method`."""
    for span in spans(page):
        path, _, name = span.partition(":")
        if not re.fullmatch(r"[\w./*-]+", path):
            continue
        if path.startswith(ROOMS) or (path in ROOT_FILES and "." in path) or path == "Makefile":
            yield path, name


@every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    """A path in backticks is there, and so is the function or type named behind its colon."""
    for path, name in paths(page):
        found = sorted(ROOT.glob(path)) if "*" in path else [ROOT / path]
        assert found and all(p.exists() for p in found), f"{path} does not exist"
        if name:
            last = name.rpartition(".")[2].removesuffix("()")
            defines = (
                rf"(?:def|class|struct|enum|int|void|bool|__u32|__u64|define)\s+\**{last}\b"
                rf"|^{last}\b|\*{last}\(|self\.{last} ="
            )
            assert re.search(defines, text_of(found[0]), re.MULTILINE), f"{path} defines no {last}"


@every_page
def test_every_relative_link_resolves(page: Path) -> None:
    """Links lead to files that exist, and to headings that those files have."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if fragment and file.suffix == ".md":
            assert fragment in headings(file), f"{target}: no such heading"


def later_commands() -> list[str]:
    """Return the commands that the runbook lists as not yet available."""
    section = text_of(RUNBOOK).partition(LATER)[2].partition("\n## ")[0]
    return [span for span in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)]


def words_of(line: str) -> list[str] | None:
    """Return the words from `stella` on of a shell line, or None when it runs no such command."""
    match = re.search(r"(?:^|[\s'(/])(?:sudo )?stella (?=[a-z-]|$)(.*)", line)
    if match is None:
        return None
    bare = re.split(r"\s[|>&;#]|['\")]\s*$|'$", match[1])[0].strip().rstrip("'")
    return shlex.split(bare)


def resolve(words: list[str]) -> tuple[click.Command | None, list[str], str]:
    """Return the command that `words` name, its arguments, and the command's full name."""
    command: click.Command = commands.stella
    name = ["stella"]
    rest = list(words)
    while isinstance(command, click.Group) and rest:
        if rest[0].startswith("-") or rest[0] in ("COMMAND", "…"):
            break
        found = command.commands.get(rest[0])
        name.append(rest.pop(0))
        if found is None:
            return None, rest, " ".join(name)
        command = found
    return command, rest, " ".join(name)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every stella command in a page's blocks and backticks."""
    lines = [
        line
        for language, block in fences(page)
        if language in ("sh", "bash", "console")
        for line in block.replace("\\\n", " ").splitlines()
        if language != "console" or line.startswith(("$ ", "# "))
    ]
    for line in [*lines, *(span for span in spans(page) if re.match(r"(sudo )?(\S*/)?stella [a-z]", span))]:
        if (words := words_of(line)) is not None:
            yield words


@every_page
def test_every_command_that_is_named_exists(page: Path) -> None:
    """A command in an example is in the command tree with its options, or listed as not yet available."""
    later = {" ".join(shlex.split(row)) for row in later_commands()}
    for words in command_lines(page):
        command, rest, name = resolve(words)
        if command is None:
            assert name in later, f"{name} is neither a command nor listed as not in this release"
            continue
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        for word in rest:
            if word.startswith("-") and word != "-":
                assert word.partition("=")[0] in options, f"{name} has no option {word}"


def test_what_is_listed_as_not_available_is_not() -> None:
    """When a command arrives, its row in the runbook must go."""
    for row in later_commands():
        command, _, name = resolve(shlex.split(row)[1:])
        assert command is None, f"{name} exists: take it out of the list"


def test_the_runbook_has_every_section_that_errors_name() -> None:
    """Every `runbook=` value is a heading of the runbook, under the name that the command prints."""
    named = set(failure.RUNBOOK_SECTIONS)
    for source in SOURCES:
        named |= set(re.findall(r'(?i)_?runbook"?(?:: (?:str|Final))?(?: ?= ?|: )"([a-z-]+)"', text_of(source)))
    found = headings(RUNBOOK)
    assert set() == named - set(found)
    assert failure.RUNBOOK_SECTIONS == {key: found[key] for key in failure.RUNBOOK_SECTIONS}


@every_page
def test_every_configuration_example_loads(page: Path, tmp_path: Path) -> None:
    """A yaml block with the key `signals` is a configuration that the program accepts."""
    for number, (language, block) in enumerate(fences(page)):
        if language == "yaml" and "signals:" in block:
            path = tmp_path / f"{number}.yaml"
            path.write_text(block, encoding="utf-8")
            config.load(path, {})


@every_page
def test_every_key_and_metric_that_is_named_exists(page: Path) -> None:
    """`signals.…` in backticks is a key or a section; `stellaops_signals_…` is in the catalogue."""
    keys = {field.key for field in config.declared()}
    sections = {key.rpartition(".")[0] for key in keys}
    for span in spans(page):
        if re.fullmatch(r"signals(\.[a-z_]+)+", span):
            assert span in keys | sections, f"there is no key {span}"
        if match := re.match(r"stellaops_signals_\w+", span):
            name = re.sub(r"_(bucket|count|sum)$", "", match[0])
            assert name in metrics.CATALOGUE, f"there is no metric {span}"


@pytest.mark.parametrize("record", DECISIONS, ids=lambda p: p.name)
def test_a_decision_record_has_its_three_parts(record: Path) -> None:
    """Context, decision, what it costs; and its number stands in its title."""
    found = list(headings(record).values())
    assert re.fullmatch(rf"{record.name[:4]}: .+", found[0])
    assert list(RECORD_PARTS) == [heading for heading in found if heading in RECORD_PARTS]


def test_the_readme_names_every_document() -> None:
    """Each page of docs/ and each room's README is linked from the README's table."""
    readme = ROOT / "README.md"
    linked = {
        (readme.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(readme))
        if not re.match(r"[a-z]+:", target)
    }
    missing = {p for p in PAGES if p != readme and p not in linked and p.parent.name != "decisions"}
    assert set() == {str(p.relative_to(ROOT)) for p in missing}
    assert ROOT / "docs" / "decisions" in linked
