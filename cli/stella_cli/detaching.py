"""`stella signals detach`: take our probes out of the kernel, whether or not a node answers.

    look → detach by id where the kernel does → end who holds the rest → remove pins → look again → say what was done

A tracepoint's or a uprobe's link ends with the last descriptor of it, so the process that holds it has to end, and
with its pin, which outlives a collector that was killed.  Only a collector is ended, and the supervisor that would
start it again: both are known by pid and start time, by what they run, and by the descriptors they hold.  In order
first (the evidence is closed and signed, the pins are gone), then at once.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from stella_cli import collector_report, console, node_file, process
from stella_cli.process import Identity
from stella_cli.settings import Settings
from stella_shared.errors import BadAnswer, BrokenPromise, NotFound, NotPermitted

_LOOK_SECONDS: Final = 0.2
_KILL_SECONDS: Final = 5.0
_FREED_SECONDS: Final = 10.0
_MODULE: Final = "stella_collector"


class _Link(msgspec.Struct):
    id: int
    detached: bool
    reason: str


class _Program(msgspec.Struct):
    id: int
    name: str
    tag: str
    this_release: bool
    links: list[_Link]
    holders: list[int]


class _Pin(msgspec.Struct):
    path: str
    run: str
    own: bool
    attached: bool
    programs: list[int]
    holders: list[int]


class _Found(msgspec.Struct):
    programs: list[_Program]
    pins: list[_Pin]


class _Done(msgspec.Struct):
    """What was done to one program."""

    program: _Program
    done: str


def run(settings: Settings, *, everything: bool, pins: bool, dry_run: bool, wait_seconds: float, as_json: bool) -> None:
    """Detach this node's probes, or with `everything` those of every node here; print what was done to each.

    Raises `NotPermitted` without the right to look, and `BadAnswer` when something of it is left.
    """
    own = node_file.running(settings.state)
    mine = {child.who.pid for child in own.children if child.name == "collector"} if own else set()
    before = _look(settings, "list")
    meant = [pin for pin in before.pins if everything or pin.own]
    pinned = {number for pin in meant for number in pin.programs}
    if not everything and not mine and not pinned and not dry_run and not pins:
        raise NotFound(
            f"no node runs on {settings.state}, so there is nothing of it to detach",
            hint="--all takes the probes of every node on this machine out of the kernel; --dry-run shows them",
            runbook="emergency-disable-collection",
        )
    wanted = [p for p in before.programs if everything or mine & set(p.holders) or p.id in pinned]
    holders = sorted({pid for p in wanted for pid in p.holders if everything or pid in mine})
    if dry_run:
        report = [_Done(p, _plan(p, pinned)) for p in wanted]
        _show(report, [(pin.path, "would be unpinned, but its counters") for pin in _stale(meant)], as_json=as_json)
        return
    detached = _detach(settings, wanted, everything=everything)
    ended = _end(holders, wait_seconds) if holders else {}
    left_over = [pin for pin in _look(settings, "list").pins if everything or pin.own]
    done = [(pin.path, _unpin(pin, remove=pins)) for pin in _stale(left_over)]
    after = _look_when_settled(settings, {p.id for p in wanted})
    left = {p.id: p for p in after.programs}
    report = [_Done(p, _outcome(p, left.get(p.id), detached, ended)) for p in wanted]
    _show(report, done, as_json=as_json)
    remaining = [p for p in wanted if p.id in left and any(not link.detached for link in left[p.id].links)]
    if remaining:
        pids = sorted({pid for p in remaining for pid in left[p.id].holders})
        raise BadAnswer(
            f"{len(remaining)} programs are still attached, held by {_named(pids)}",
            hint="end what holds them; a process in another pid namespace is seen from its own",
            runbook="emergency-disable-collection",
        )


def _look(settings: Settings, how: str) -> _Found:
    try:
        return msgspec.convert(collector_report.ask(settings.path, "--loaded", how), _Found)
    except msgspec.ValidationError as e:
        raise BrokenPromise(f"the collector's report of programs: {e}") from None


def _look_when_settled(settings: Settings, wanted: set[int]) -> _Found:
    """Look until what nobody holds is gone: the kernel frees programs a moment after their last descriptor."""
    deadline = time.monotonic() + _FREED_SECONDS
    while True:
        found = _look(settings, "list")
        if time.monotonic() > deadline or not any(p.id in wanted and not p.holders for p in found.programs):
            return found
        time.sleep(_LOOK_SECONDS)


def _detach(settings: Settings, wanted: list[_Program], *, everything: bool) -> set[int]:
    """Return the ids of links that the kernel let go of.  It does so by id, whoever's they are: with `everything`."""
    if not everything or not wanted:
        return set()
    return {link.id for p in _look(settings, "detach").programs for link in p.links if link.detached}


def _plan(program: _Program, pinned: set[int]) -> str:
    if not program.holders and program.id in pinned:
        return "would be unpinned: nobody reads it"
    if not program.holders:
        return "would be detached by its link's id" if program.links else "attached to nothing"
    ours = [pid for pid in program.holders if _is_collector(pid)]
    return f"would end {_named(ours)}" if ours else f"would stay: held by {_named(program.holders)}, no collector"


def _outcome(before: _Program, after: _Program | None, detached: set[int], ended: dict[int, str]) -> str:
    if before.links and {link.id for link in before.links} <= detached:
        return "detached"
    if after is not None and not after.links and not before.links:
        return "attached to nothing"
    if after is None or not after.links:
        how = sorted({f"{words} (pid {pid})" for pid, words in ended.items() if pid in before.holders})
        return f"gone: {', '.join(how)}" if how else "gone with what held it"
    return f"LEFT: held by {_named(after.holders)}"


def _named(pids: Iterable[int]) -> str:
    told = ", ".join(f"pid {pid}" for pid in pids)
    return told or "nobody who can be seen from here"


# ---- ending the holders


def _is_collector(pid: int) -> bool:
    words = process.command_line(pid)
    return any(one == "-m" and two == _MODULE for one, two in itertools.pairwise(words))


def _supervisor_of(pid: int) -> int:
    """Return the pid of the `stella signals start` that would start a collector again, 0 when there is none."""
    parent = process.parent(pid)
    words = process.command_line(parent) if parent > 1 else []
    starts = "signals" in words and "start" in words
    return parent if starts and any(Path(w).name == "stella" or w == "stella_cli" for w in words) else 0


def _end(holders: list[int], wait_seconds: float) -> dict[int, str]:
    """End the collectors among `holders`; return what became of each, by pid."""
    collectors = {pid: who for pid in holders if _is_collector(pid) and (who := process.identity(pid))}
    supervisors = {s: who for pid in collectors if (s := _supervisor_of(pid)) and (who := process.identity(s))}
    alone = [who for pid, who in collectors.items() if _supervisor_of(pid) not in supervisors]
    asked = [*supervisors.values(), *alone]
    for who in asked:
        _send(who, signal.SIGTERM)
    _wait([*collectors.values()], wait_seconds)
    left = [who for who in collectors.values() if process.is_alive(who)]
    # The supervisor first: it would start its collector again.
    for who in [*(supervisors.values() if left else ()), *left]:
        _send(who, signal.SIGKILL)
    _wait(left, _KILL_SECONDS)
    return {pid: "its collector was killed" if who in left else "its node was ended" for pid, who in collectors.items()}


def _send(who: Identity, number: signal.Signals) -> None:
    try:
        fd = os.pidfd_open(who.pid)
    except ProcessLookupError:
        return
    try:
        # Looked at again with the pid held: it cannot have passed to somebody else since.
        if process.is_alive(who):
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise NotPermitted(f"process {who.pid} runs as another user", hint="sudo stella signals detach --all") from None
    finally:
        os.close(fd)


def _wait(people: list[Identity], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(process.is_alive, people)) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)


# ---- pins


def _stale(pins: list[_Pin]) -> list[_Pin]:
    """Return those of runs that nobody reads: no process has their counters open."""
    return [pin for pin in pins if not pin.holders]


def _unpin(pin: _Pin, *, remove: bool) -> str:
    """Take the probes of a run out of the kernel; with `remove`, its maps too."""
    path = Path(pin.path)
    probes = [*sorted(path.glob("link-*"), reverse=True), *path.glob("program-*")]
    try:
        for probe in probes:
            probe.unlink()
        if not remove:
            return "kept, without probes: the next start of its node reads what is in it; --pins removes it"
        for rest in path.iterdir() if path.is_dir() else ():
            rest.unlink()
        (path.rmdir if path.is_dir() else path.unlink)()
        path.parent.rmdir()
    except OSError as e:
        if path.exists():
            return f"LEFT: {e.strerror}"
    return "removed"


def _show(report: list[_Done], pins: list[tuple[str, str]], *, as_json: bool) -> None:
    if as_json:
        body: dict[str, Any] = {
            "programs": [{**msgspec.to_builtins(one.program), "done": one.done} for one in report],
            "pins": [{"path": path, "done": done} for path, done in pins],
        }
        click.echo(json.dumps(body, ensure_ascii=False, indent=2))
        return
    if not report:
        click.echo("no program of ours is loaded that this concerns")
    else:
        console.table(
            ["program", "id", "tag", "links", "done"],
            [
                [
                    one.program.name + ("" if one.program.this_release else " (of another release)"),
                    str(one.program.id),
                    one.program.tag,
                    " ".join(str(link.id) for link in one.program.links),
                    one.done,
                ]
                for one in report
            ],
        )
    for path, done in pins:
        click.echo(f"run {path}: {done}")
