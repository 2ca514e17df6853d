"""Limits in the kernel: what they cost is counted, whose it was is told, and when they have ceased to."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stella_collector import targets
from stella_shared.errors import ConfigError
from stella_shared.events import FileOpen, Throttle
from tests.collector.conftest import Watch, Watched, signals_of
from tests.system.node import Cgroup, build_generator

Start = Callable[..., Watch]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that opens files as fast as it is told."""
    return build_generator(tmp_path_factory.mktemp("generator"))


def burst(w: Watch, generator: Path, folder: Path, count: int, where: Path | None = None) -> None:
    """Open `count` files in `folder` as fast as it goes, in the test's cgroup or one below it."""
    folder.mkdir(exist_ok=True)
    procs = (where or w.cgroup.path) / "cgroup.procs"
    script = f'echo $$ > "{procs}" && exec "$0" "$@" < /dev/zero'
    w.cgroup.run("/bin/sh", "-c", script, generator, folder, str(count), "0", "4", stdout=-3).wait(60)


def throttles(seen: Watched) -> list[tuple[int, Throttle]]:
    """Return the throttle events with the cgroup that each is about."""
    pairs = zip(seen.records, seen.events(), strict=True)
    return [(r.cgroup_id, e) for r, e in pairs if isinstance(e, Throttle)]


def test_the_nodes_limit_tells_begin_and_end(watch: Start, generator: Path, tmp_path: Path) -> None:
    """One start, one stop with what it cost, and the losses of the ledger are just that."""
    w = watch(max_events_per_second=2000, filters__paths__allowlist=[f"{tmp_path}/**"])
    burst(w, generator, tmp_path / "files", 5000)
    time.sleep(0.4)
    w.kernel.tell_limits()
    w.kernel.tell_limits()
    seen = w.finish()
    (_, start), (_, stop) = throttles(seen)
    assert ("node", "start", 2000, None) == (start.scope, start.state, start.limit_per_second, start.dropped)
    assert ("node", "stop", start.since_ns) == (stop.scope, stop.state, stop.since_ns)
    assert seen.ledger.lost["rate_limit"] == stop.dropped
    assert stop.until_ns is not None and stop.until_ns >= stop.since_ns
    opens = [e for e in seen.events(FileOpen) if f"{tmp_path}/files" in (e.path or "")]
    assert len(opens) + (stop.dropped or 0) >= 5000


def test_a_loud_container_costs_the_others_nothing(
    watch: Start, generator: Path, cgroup: Cgroup, tmp_path: Path
) -> None:
    """The limit is each cgroup's own, and the throttle says whose it was."""
    loud, quiet = cgroup.path / "loud", cgroup.path / "quiet"
    loud.mkdir()
    quiet.mkdir()
    w = watch(max_events_per_second_per_container=3000, filters__paths__allowlist=[f"{tmp_path}/**"])
    burst(w, generator, tmp_path / "noise", 6000, loud)
    burst(w, generator, tmp_path / "still", 200, quiet)
    time.sleep(0.4)
    w.kernel.tell_limits()
    ids = {loud.stat().st_ino: "loud", quiet.stat().st_ino: "quiet"}
    seen = w.finish()
    found = throttles(seen)
    assert {"loud"} == {ids.get(cgroup_id) for cgroup_id, _ in found}
    assert ["start", "stop"] == [e.state for _, e in found]
    assert {"cgroup"} == {e.scope for _, e in found}
    assert 200 <= len([e for e in seen.events(FileOpen) if f"{tmp_path}/still" in (e.path or "")])
    assert sum(e.dropped or 0 for _, e in found) == seen.ledger.lost["rate_limit"]
    loud.rmdir()
    quiet.rmdir()


def test_a_throttle_that_goes_on_is_told_once(watch: Start, generator: Path, tmp_path: Path) -> None:
    """While the limit goes on costing records there is no second start, and no stop."""
    w = watch(max_events_per_second=500, filters__paths__allowlist=[f"{tmp_path}/**"])
    for _ in range(6):
        burst(w, generator, tmp_path / "files", 500)
        w.kernel.tell_limits()
    assert ["start"] == [e.state for _, e in throttles(w.finish())]


# ---- another configuration while it runs


def opened(w: Watch, *paths: Path) -> None:
    """Have a process open these files."""
    w.python("import os, sys\nfor path in sys.argv[1:]: os.close(os.open(path, os.O_RDONLY | os.O_CREAT))", *paths)


def test_filters_change_while_the_probes_stay(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """Lists, limits and targets of the new configuration hold from then on; numbers go on without a hole."""
    scope = {"filters.target_cgroups": [cgroup.name]}
    w = watch(filters__paths__allowlist=[f"{tmp_path}/first/**"])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    opened(w, tmp_path / "first" / "a", tmp_path / "second" / "a")
    w.kernel.apply(signals_of(**scope, filters__paths__allowlist=[f"{tmp_path}/second/**"]))
    opened(w, tmp_path / "first" / "b", tmp_path / "second" / "b")
    w.kernel.apply(signals_of(**scope, filters__paths__denylist=[f"{tmp_path}/second/**"]))
    opened(w, tmp_path / "first" / "c", tmp_path / "second" / "c")
    w.kernel.apply(signals_of(**scope, max_events_per_second=300, filters__paths__allowlist=[f"{tmp_path}/**"]))
    opened(w, *[tmp_path / f"{n}" for n in range(200)])
    w.kernel.apply(signals_of(**scope, filters__paths__allowlist=[f"{tmp_path}/first/**"]))
    opened(w, tmp_path / "first" / "d", tmp_path / "second" / "d")
    seen = w.finish()
    found = [p.removeprefix(f"{tmp_path}/") for p in seen.paths() if p and p.startswith(str(tmp_path))]
    assert ["first/a", "second/b", "first/c", "first/d"] == [p for p in found if "/" in p]
    assert 0 < len([p for p in found if "/" not in p]) < 200
    assert seen.ledger.lost["rate_limit"] > 0


def test_what_a_running_kernel_side_cannot_take_changes_nothing(watch: Start, cgroup: Cgroup, tmp_path: Path) -> None:
    """From targets to the whole node, and a target that can never be: refused, and the old filters hold."""
    w = watch(filters__paths__allowlist=[f"{tmp_path}/**"])
    with pytest.raises(ConfigError, match="between watching its targets and watching everything"):
        w.kernel.apply(signals_of(filters__paths__denylist=[f"{tmp_path}/**"]))
    deep = "/".join(["", *("x" * 12)])
    with pytest.raises(ConfigError, match="levels"):
        w.kernel.apply(signals_of(filters__target_cgroups=[deep], filters__paths__denylist=[f"{tmp_path}/**"]))
    opened(w, tmp_path / "a")
    assert f"{tmp_path}/a" in w.finish().paths()
    assert targets.any_wanted(signals_of(filters__target_cgroups=[cgroup.name]))
