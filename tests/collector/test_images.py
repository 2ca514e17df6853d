"""Watched functions of containers by image: a layer that containers of two images share, without any runtime."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stella_collector.binaries import watch as watching
from stella_shared.events import FunctionCall
from tests.collector.conftest import Watch
from tests.collector.functions_kit import CALLER, calls, compiled, entry, heeding, wait_for
from tests.collector.test_functions import ALONE

pytestmark = pytest.mark.kernel
Start = Callable[..., Watch]

WEB, DB = "a1" * 32, "b2" * 32
#: Enters a cgroup, mounts an overlay that nobody else sees over a layer, and becomes the program in it.
CONTAINED = (
    'echo $$ > "$3/cgroup.procs" && mount -t tmpfs none "$1" && mkdir "$1/u" "$1/w" "$1/m" && '
    'mount -t overlay overlay -o lowerdir="$2",upperdir="$1/u",workdir="$1/w" "$1/m" && exec "$1/m/caller" "$4"'
)
BESIDE = 'echo $$ > "$3/cgroup.procs" && exec "$1/m/caller" "$4"'


class Containers:
    """Processes in cgroups that are named as containers are, with overlays over one layer."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        self._watch, self._folder = watch, folder
        (folder / "layer").mkdir()
        compiled(folder / "layer", "caller", CALLER, "-pthread")
        self._begun: list[subprocess.Popen[bytes]] = []
        self.cgroups = [watch.cgroup.path / container for container in (WEB, DB)]
        for cgroup in self.cgroups:
            cgroup.mkdir()

    def run(
        self, container: str, times: int, *, beside: subprocess.Popen[bytes] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a caller, which waits for `go`; `beside` another one it has the same mount."""
        where = ("unshare", "-m") if beside is None else ("nsenter", "-m", "-t", str(beside.pid))
        own = self._folder / str(len(self._begun)) if beside is None else self._folder / "0"
        own.mkdir(exist_ok=True)
        arguments = (own, self._folder / "layer", self._watch.cgroup.path / container, str(times))
        command = (*where, "sh", "-c", CONTAINED if beside is None else BESIDE, "sh", *arguments)
        process = self._watch.cgroup.run(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._begun.append(process)
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "caller\n")
        return process

    def call(self, process: subprocess.Popen[bytes]) -> None:
        """Have a caller make its calls once, and wait until it has."""
        assert process.stdin and process.stdout
        process.stdin.write(b"go\n")
        assert b"done\n" == process.stdout.readline()

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End a caller."""
        process.communicate(timeout=20)

    def remove(self) -> None:
        """End all that was started, then remove the cgroups."""
        for process in self._begun:
            process.kill()
            process.communicate(timeout=20)
        for cgroup in self.cgroups:
            cgroup.rmdir()


@contextlib.contextmanager
def containers(watch: Watch, folder: Path) -> Iterator[Containers]:
    """Give containers, removed afterwards."""
    made = Containers(watch, folder)
    try:
        yield made
    finally:
        made.remove()


def reason(watch: Watch, image: str) -> str:
    """Return why nothing is watched for an image."""
    return next(state.reason for state in watch.kernel.binaries.states() if state.image == image)


def watched(watch: Watch) -> dict[str, int]:
    """Return how many functions have probes, by image."""
    return {state.image: state.functions for state in watch.kernel.binaries.states() if state.functions}


def test_a_file_is_taken_once_a_container_of_the_image_has_it(watch: Start, tmp_path: Path) -> None:
    """What another image's container has run before, and was dull, is taken when one is known to be of the image."""
    w = watch(**ALONE, probes__functions=[entry("/**/caller", "first", image="web*")])
    with heeding(w), containers(w, tmp_path) as running:
        other = running.run(DB, 100)
        web = running.run(WEB, 3)
        assert w.kernel.binaries.select({"web*": frozenset()}) is False
        w.kernel.binaries.scan()
        running.call(other)
        running.call(web)
        assert ({}, "no container of that image is known") == (watched(w), reason(w, "web*"))
        running.end(other)
        assert w.kernel.binaries.select({"web*": frozenset([WEB])})
        assert {"web*": 1} == watched(w)
        running.call(web)
        running.end(web)
        # From now on each process is seen from its first call, in whichever mount of the layer.
        web = running.run(WEB, 5)
        running.call(web)
        found = w.finish().events(FunctionCall)
    assert Counter({"first": 8}) == calls(found)


def test_a_file_that_is_dull_elsewhere_is_told_of_each_time(watch: Start, tmp_path: Path) -> None:
    """A process of a known container of the image is told of, though another image's has run the very file before."""
    w = watch(**ALONE, probes__functions=[entry("/**/caller", "first", image="web*")])
    w.kernel.binaries.select({"web*": frozenset([WEB])})
    with containers(w, tmp_path) as running:
        other = running.run(DB, 100)
        running.run(DB, 100, beside=other)  # so that all else that a start takes is known
        w.kernel.binaries.look_at_notices()
        running.call(other)
        assert ({}, "no container of that image runs such a file yet") == (watched(w), reason(w, "web*"))
        web = running.run(WEB, 3, beside=other)
        w.kernel.binaries.look_at_notices()
        assert {"web*": 1} == watched(w)
        running.call(web)
        found = w.finish().events(FunctionCall)
    assert Counter({"first": 3}) == calls(found)


def test_an_image_adds_to_what_is_watched_and_goes_with_its_last_container(
    watch: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry without image stays as it is; the layer's file loses the image's probes when no container has it."""
    asked = [entry("/**/caller", "first", image="web*"), entry("/**/caller", "second")]
    w = watch(**ALONE, probes__functions=asked)
    with heeding(w), containers(w, tmp_path) as running:
        other = running.run(DB, 7)
        wait_for(lambda: {"": 1} == watched(w))
        running.call(other)
        w.kernel.binaries.select({"web*": frozenset([WEB])})
        web = running.run(WEB, 3)
        wait_for(lambda: {"": 1, "web*": 1} == watched(w))
        running.call(web)
        running.call(other)  # through the same inode: recorded too, as docs/functions.md says
        running.end(web)
        monkeypatch.setattr(watching, "_UNUSED_SECONDS", 1.0)
        time.sleep(1.1)
        w.kernel.binaries.scan()
        assert {"": 1} == watched(w)
        running.call(other)
        found = w.finish().events(FunctionCall)
    assert Counter({"first": 10, "second": 4}) == calls(found)
