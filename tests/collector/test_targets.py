"""Targets: containers by id and by selector become the cgroup ids that the kernel compares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from stella_collector import targets
from stella_collector.selected import Selected
from stella_collector.targets import Target
from stella_shared import selectors
from stella_shared.config import Filters, Probes, Signals, WatchedFunctions, check_runnable, load, selector_texts
from stella_shared.errors import BrokenPromise, ConfigError
from stella_shared.selectors import STALE_SECONDS, TargetSet, encode_target_set

A, B, C = "a1" * 32, "b2" * 32, "c3" * 32
WEB, IMAGE = "name:web-*", "image:*/nginx:*"


@pytest.fixture
def tree() -> Iterator[Path]:
    """Give a real cgroup of our own, removed afterwards with all that is in it."""
    top = targets.hierarchies()[0].root / f"zz-stella-test-{os.getpid()}-targets"
    if os.geteuid() != 0 or not os.access(top.parent, os.W_OK):
        pytest.skip("needs root and a writable cgroup2 mount")
    top.mkdir()
    yield top
    for path, _, _ in os.walk(top, topdown=False):
        Path(path).rmdir()


def make(path: Path) -> int:
    path.mkdir(parents=True)
    return path.stat().st_ino


def signals(*target_containers: str) -> Signals:
    return Signals(node="n", filters=Filters(target_containers=list(target_containers)))


def told(instance: str, node: str = "n", *, partial: bool = False, **sets: list[str]) -> bytes:
    names = {"web": WEB, "image": IMAGE}
    found = {names[key]: ids for key, ids in sets.items()}
    return encode_target_set(TargetSet(node, instance, found, partial=partial))


def test_ids_and_selectors_are_found_by_their_cgroups(tree: Path) -> None:
    """Each container is found below any parent and under any runtime's name; a selector says which it was."""
    first = make(tree / "docker" / A)
    second = make(tree / f"docker-{B}.scope")
    make(tree / "docker" / C)
    level = len(tree.relative_to(targets.hierarchies()[0].root).parts)
    found = targets.resolve(signals(f"docker://{A[:12]}", WEB, IMAGE), {WEB: [A, B], IMAGE: []})
    assert {
        Target(f"docker://{A[:12]}", first, level + 2),
        Target(WEB, first, level + 2, A),
        Target(WEB, second, level + 1, B),
        Target(IMAGE, 0, 0),
    } == set(found)


def test_what_is_not_there_is_said_to_be_missing() -> None:
    """An id without a cgroup, and a selector that nobody has resolved, have the number 0."""
    absent = "d4" * 32
    assert [Target(absent, 0, 0)] == targets.resolve(signals(absent))
    assert [Target(WEB, 0, 0)] == targets.resolve(signals(WEB))
    assert [Target(WEB, 0, 0, absent)] == targets.resolve(signals(WEB), {WEB: [absent]})


def test_enrichers_sets_are_joined_and_the_last_known_stays() -> None:
    """A silent enricher gives way to one that speaks; when all are silent, what was known stays."""
    now = [0.0]
    selected = Selected(signals(WEB, IMAGE), clock=lambda: now[0])
    assert (True, False) == (selected.wanted, selected.heard)
    before = selected.changed
    selected.hear(told("e1", web=[A]))
    assert before.is_set()
    assert not selected.changed.is_set()
    selected.hear(told("e2", web=[B], image=[B]))
    assert {WEB: [A, B], IMAGE: [B]} == selected.containers()
    now[0] += 10 * STALE_SECONDS
    assert {WEB: [A, B], IMAGE: [B]} == selected.containers()
    selected.hear(told("e2", web=[B]))
    assert {WEB: [B], IMAGE: []} == selected.containers()


def test_who_does_not_know_all_takes_nothing_away() -> None:
    """A new enricher that a runtime has not answered yet adds what it knows; who knows all has the last word."""
    now = [0.0]
    selected = Selected(signals(WEB), clock=lambda: now[0])
    selected.hear(told("old", web=[A]))
    now[0] += 2 * STALE_SECONDS
    selected.hear(told("new", partial=True, web=[B]))
    assert {WEB: [A, B]} == selected.containers()
    selected.hear(told("new", web=[B]))
    assert ({WEB: [B]}, False) == (selected.containers(), selected.truncated)
    selected.hear(encode_target_set(TargetSet("n", "new", {WEB: [B]}, truncated=True)))
    assert selected.truncated


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"node":"n","instance":"e","selectors":{"name:web-*":["../x"]}}',
        told("e", node="other", web=[A]),
        encode_target_set(TargetSet("n", "e", {WEB: [f"{i:064x}" for i in range(1025)]})),
    ],
)
def test_sets_that_are_none_are_refused(data: bytes) -> None:
    """Another node's, one without form, and one beyond the bound change nothing."""
    selected = Selected(signals(WEB))
    with pytest.raises(BrokenPromise):
        selected.hear(data)
    assert ({WEB: []}, False) == (selected.containers(), selected.heard)


def test_images_of_watched_functions_are_no_targets() -> None:
    """They are resolved like selectors, once for each, and told apart from what is watched."""
    asked = Signals(
        node="n",
        filters=Filters(target_containers=[WEB, IMAGE]),
        probes=Probes(
            functions=[
                WatchedFunctions(binary="/bin/x", functions=["f"], image=image)
                for image in ("", "db*", "*/nginx:*", "db*")
            ]
        ),
    )
    assert [WEB, IMAGE, "image:db*"] == selector_texts(asked)
    selected = Selected(asked)
    selected.hear(encode_target_set(TargetSet("n", "e", {WEB: [A], IMAGE: [B], "image:db*": [C]})))
    assert {WEB: [A], IMAGE: [B]} == selected.containers()
    assert {"*/nginx:*": frozenset([B]), "db*": frozenset([C])} == selected.images()
    selected.ask(msgspec.structs.replace(asked, filters=Filters()))
    assert ({}, {"*/nginx:*": frozenset([B]), "db*": frozenset([C])}) == (selected.containers(), selected.images())
    assert selected.wanted


def test_only_what_was_asked_for_is_taken() -> None:
    """A selector that is not configured here adds nothing."""
    selected = Selected(signals(WEB))
    selected.hear(told("e", image=[A]))
    assert {WEB: []} == selected.containers()


@pytest.mark.parametrize("image", ["//x", "a\nb"])
def test_an_image_that_is_no_pattern_of_names_is_refused(image: str) -> None:
    """The entry is named with what is allowed."""
    with pytest.raises(ConfigError, match=r"signals\.probes\.functions.*image is"):
        load(None, {}, {"probes.functions": [{"binary": "/bin/x", "functions": ["f"], "image": image}]})


@pytest.mark.parametrize("text", ["name:", "image:", "label:", "label:=x", "label:a*=x", "name:" + "a" * 300])
def test_a_selector_that_is_none_is_named_with_the_fix(tmp_path: Path, text: str) -> None:
    """The configuration is refused, and says what a selector looks like."""
    file = tmp_path / "stellaops.yaml"
    file.write_text(f"signals: {{filters: {{target_containers: ['{text}']}}}}\n")
    with pytest.raises(ConfigError, match=r"signals\.filters\.target_containers"):
        load(file, {})


def test_selectors_need_somebody_to_ask() -> None:
    """With every socket switched off a node refuses to start."""
    off = {f"runtimes.{api}_socket": "" for api in ("docker", "podman", "containerd", "cri")}
    with pytest.raises(ConfigError, match="no runtime may be asked"):
        check_runnable(load(None, {}, {**off, "filters.target_containers": [WEB]}))
    check_runnable(load(None, {}, {**off, "filters.target_containers": [A]}))
    of_image = {"binary": "/bin/x", "functions": ["f"], "image": "db*"}
    with pytest.raises(ConfigError, match="which containers are of it"):
        check_runnable(load(None, {}, {**off, "probes.functions": [of_image]}))
    assert [] == selectors.selectors([A, f"docker://{A}"])
