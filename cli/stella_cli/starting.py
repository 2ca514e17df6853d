"""`stella signals start`: check what a node needs, run it (in the foreground or detached), tell about it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import click
import msgspec

from stella_cli import event_rows, failure, nats_server, node_file, process, settings
from stella_cli.service_log import Line
from stella_cli.settings import Settings
from stella_cli.supervisor import Part, Plan, Supervisor, write_effective_config
from stella_cli.tailing import lines
from stella_shared import clock, config, lifecycle
from stella_shared.config import Signals
from stella_shared.errors import (
    BrokenPromise,
    ConfigError,
    NotFound,
    NotPermitted,
    StellaError,
    TryAgain,
    UsageError,
)
from stella_shared.evidence import keys, store

FIRST_EVENTS: Final = 10
FIRST_EVENTS_SECONDS: Final = 15.0
DEMO_NODE: Final = "demo"
_DEMO_MARK: Final = "DEMO: recorded kernel events are replayed; nothing of this machine is observed"
_BY_EXIT_CODE: Final[dict[int, type[StellaError]]] = {
    e.exit_code: e for e in (BrokenPromise, UsageError, NotPermitted, NotFound, TryAgain)
}


def run(given: str | None, target: str | None, *, detach: bool, demo: bool, ready_fd: int) -> None:
    """Run a node until it is stopped; with `detach`, until it is ready.

    With `ready_fd` this is the detached node itself: it tells there, in one line of JSON, that it is ready or
    what failed.
    """
    try:
        _run(given, target, detach=detach, demo=demo, ready_fd=ready_fd)
    except StellaError as e:
        if ready_fd >= 0:
            body = {"error": str(e), "hint": e.hint, "runbook": e.runbook, "exit_code": e.exit_code}
            _tell(ready_fd, body)
        raise


def _run(given: str | None, target: str | None, *, detach: bool, demo: bool, ready_fd: int) -> None:
    chosen = _demo_settings(given, target) if demo else settings.load(given, target)
    config.check_runnable(chosen.signals)
    if not demo:
        _require_capabilities()
    node_file.make_state_directory(chosen.state)
    if detach:
        _detach(chosen, given, target, demo=demo)
        return
    with node_file.lock(chosen.state):
        orphans = node_file.end_orphans(chosen.state)
        if orphans:
            click.echo(f"ended what an earlier node left running: {', '.join(orphans)}", err=True)
        _require_gateway_port(chosen.signals)
        store.initialise(chosen.signals)
        signals = _with_port(chosen.signals)
        write_effective_config(chosen.state, signals)
        plan = Plan(
            signals=signals,
            state=chosen.state,
            env=_environment(),
            config_name=chosen.name,
            load=lambda: _again_with_port(given, target, signals),
            hangup_reloads=not sys.stdin.isatty(),
            replay=_demo_ring() if demo else None,
        )
        _Foreground(plan, _again(given, target, demo=demo), ready_fd).run()


def _with_port(signals: Signals) -> Signals:
    """Return the configuration with the port that the node's own server will have, where any will do."""
    if signals.bus.url or signals.bus.port:
        return signals
    return msgspec.structs.replace(signals, bus=msgspec.structs.replace(signals.bus, port=nats_server.choose_port(0)))


def _again_with_port(given: str | None, target: str | None, running: Signals) -> Signals:
    """Return the configuration as it stands now, with the port that the running node's server has."""
    signals = settings.load(given, target).signals
    return signals if signals.bus.port else msgspec.structs.replace(signals, bus=running.bus)


def _demo_settings(given: str | None, target: str | None) -> Settings:
    # Replayed events must never end up in a chain of real ones: a demo has a name and a place of its own.
    return settings.load(given, target or "stella-demo/evidence", state_directory="", node=DEMO_NODE)


def _demo_ring() -> Path:
    package = importlib.util.find_spec("stella_collector")
    folders = list(package.submodule_search_locations or ()) if package else []
    for folder in folders:
        ring = Path(folder) / "demo.ring"
        if ring.is_file():
            return ring
    raise NotFound("the recorded events of the demo are not installed", hint="pip install 'stella-signals[all]'")


def _require_capabilities() -> None:
    """Raise `NotPermitted` unless a collector started from here could load BPF programs."""
    held = process.capabilities_for_children()
    if process.CAP_SYS_ADMIN in held or {process.CAP_BPF, process.CAP_PERFMON} <= held:
        return
    missing = [
        name
        for number, name in ((process.CAP_BPF, "CAP_BPF"), (process.CAP_PERFMON, "CAP_PERFMON"))
        if number not in held
    ]
    raise NotPermitted(
        f"collecting kernel events needs {' and '.join(missing)}, which this user does not have",
        hint="sudo stella signals start; or, without any privilege, the same pipeline over recorded events: "
        "make demo (stella signals start --demo)",
    )


def _require_gateway_port(signals: config.Signals) -> None:
    """Raise `UsageError` when the gateway could not listen: now, not after all else has started."""
    metrics = signals.metrics
    if not metrics.enabled:
        return
    try:
        kind, _, _, _, address = socket.getaddrinfo(metrics.address, metrics.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as e:
        raise UsageError(
            f"the gateway cannot listen on {metrics.address}:{metrics.port}: {e.strerror}",
            hint="see who does: ss -ltnp; or choose another port: signals.metrics.port",
            runbook="configuration-reference",
        ) from None


def _environment() -> dict[str, str]:
    """Return the parts' environment: ours, without what the configuration has taken in, and what is meant for us."""
    ours = ("NOTIFY_SOCKET", "JOURNAL_STREAM", lifecycle.HEALTH_FILE)
    return {
        name: value for name, value in os.environ.items() if not name.startswith("STELLA_SIGNALS") and name not in ours
    }


def _again(given: str | None, target: str | None, *, demo: bool) -> str:
    """Return the options with which other commands find this node."""
    place = target or ("stella-demo/evidence" if demo else None)
    words = (["--config", str(Path(given).absolute())] if given else []) + (
        ["--target", str(Path(place).absolute())] if place else []
    )
    return "".join(f" {shlex.quote(word)}" for word in words)


class _Foreground:
    """A node in the foreground: what it says, to whom, and when."""

    def __init__(self, plan: Plan, again: str, ready_fd: int) -> None:
        self._plan = plan
        self._again = again
        self._ready_fd = ready_fd
        self._journal = _stderr_is_journal()
        self._supervisor = Supervisor(plan, self._say, self._show_log)
        self._signed_before = self._signed()

    def run(self) -> None:
        """Run the node to its end and say what became of it."""
        if self._plan.replay is not None:
            self._say("warning", _DEMO_MARK)
        self._say("info", f"starting a node (evidence: {self._plan.signals.output_directory})")
        try:
            anyio.run(self._supervisor.run, self._on_ready)
        except BaseExceptionGroup as group:
            raise failure.leaf(group) from group
        signed = self._signed()
        new = signed - self._signed_before
        killed = f"; killed: {', '.join(self._supervisor.killed)}" if self._supervisor.killed else ""
        self._say("info", f"stopped: {new} chunks signed, {signed} in the chain{killed}")
        self._say("info", f"check them: {self._verify_command()}")

    async def _on_ready(self) -> None:
        lifecycle.notify("READY=1")
        if self._ready_fd >= 0:
            waiting = [p.name for p in self._supervisor.parts if p.state != "ready"]
            _tell(self._ready_fd, {"ready": True, "waiting": waiting})
            return
        for line in self._banner():
            self._say("info", line)
        if not self._journal:
            await self._first_events()
            self._say("info", "try in another terminal:")
            for line in self._next_steps():
                self._say("info", f"  {line}")
            self._say("info", "Ctrl-C ends the node in order")

    def _banner(self) -> list[str]:
        plan = self._plan
        trusted = keys.load_trusted(plan.state)
        key = next((f"sha256:{k.key_id}" for k in trusted.values() if not k.not_after), "")
        if plan.signals.signing.key_id != "local":
            key = f"{plan.signals.signing.key_id} (stella signer status shows whose)"
        found = [
            f"node {config.node_name(plan.signals)} runs (pid {os.getpid()})",
            f"  evidence  {plan.signals.output_directory}",
            f"  gateway   {plan.gateway_url or 'off (signals.metrics.enabled is false)'}",
            f"  key       {key or 'none'}",
        ]
        collector = self._supervisor.part("collector")
        beat = collector.beat if collector else None
        if plan.replay is not None:
            return [*found, f"  probes    none: {_DEMO_MARK}"]
        for name, attached, reason in probe_rows(beat.detail if beat else {}):
            found.append(f"  probe     {name:<20} {'attached' if attached else f'not attached: {reason}'}")
        return found

    def _next_steps(self) -> list[str]:
        steps = [f"stella signals tail{self._again}", f"stella signals status{self._again}"]
        if self._plan.gateway_url:
            steps.append(f"curl {self._plan.gateway_url}/health")
        return [*steps, self._verify_command()]

    def _verify_command(self) -> str:
        evidence = Path(self._plan.signals.output_directory)
        # The state beside the evidence is found by itself; another one only with the node's own options.
        options = "" if self._plan.state == evidence.parent / "state" else self._again
        return f"stella signals verify-chain {shlex.quote(str(evidence))}{options}"

    async def _first_events(self) -> None:
        """Show the first events that pass; on a quiet node, stop waiting after a while."""
        bus = self._supervisor.bus
        if bus is None:
            return
        boot_unix_ns = time.time_ns() - clock.boottime_ns()
        shown = 0
        with anyio.move_on_after(FIRST_EVENTS_SECONDS):
            async for line in lines(bus, []):
                if not shown:
                    click.secho(event_rows.heading(), bold=True, err=True)
                click.echo(event_rows.row(line, boot_unix_ns), err=True)
                shown += 1
                if shown == FIRST_EVENTS:
                    break
        if not shown:
            self._say("info", "no event yet: open a file under /etc, and one appears")

    def _say(self, kind: Literal["info", "warning", "error"], text: str) -> None:
        if self._journal:
            priority = {"info": 6, "warning": 4, "error": 3}[kind]
            print(f"<{priority}>{text}", file=sys.stderr, flush=True)
            return
        colour = {"info": None, "warning": "yellow", "error": "red"}[kind]
        click.secho(text if kind == "info" else f"{kind}: {text}", fg=colour, err=True)

    def _show_log(self, part: Part, line: Line) -> None:
        if self._journal and line.severity <= 6:
            print(f"<{line.severity}>{part.name}: {line.raw}", file=sys.stderr, flush=True)
        elif line.severity <= 4:
            click.secho(f"{part.name}: {line.text}", fg="red" if line.severity <= 3 else "yellow", err=True)

    def _signed(self) -> int:
        with suppress(StellaError, OSError):
            head = store.read_head(store.places(self._plan.signals))
            return head.index if head else 0
        return 0


def probe_rows(detail: dict[str, object]) -> list[tuple[str, bool, str]]:
    """Return (probe, attached, reason) for each probe that the collector's heartbeat tells of."""
    probes: Any = detail.get("probes")
    rows = probes if isinstance(probes, list) else []
    return [
        (str(row.get("name", "?")), bool(row.get("attached")), str(row.get("reason", "")))
        for row in rows
        if isinstance(row, dict) and row.get("wanted", True)
    ]


def _detach(chosen: Settings, given: str | None, target: str | None, *, demo: bool) -> None:
    """Start the node as a process of its own and return when it is ready.  Raises what it failed with."""
    log = chosen.state / "logs" / "node.log"
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-P", "-m", "stella_cli", "signals", "start", "--ready-fd", str(write_fd)]
    command += (["--config", given] if given else []) + (["--target", target] if target else [])
    command += ["--demo"] if demo else []
    with log.open("ab") as out:
        node = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            pass_fds=(write_fd,),
            start_new_session=True,
        )
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as answer:
        said = answer.readline()
    if not said:
        code = node.wait()
        raise BrokenPromise(f"the node ended (exit code {code}) without a word", hint=f"its log is {log}")
    body = msgspec.json.decode(said, type=dict[str, Any])
    if "error" in body:
        node.wait()
        kind = _BY_EXIT_CODE.get(int(body["exit_code"]), ConfigError)
        raise kind(str(body["error"]), hint=str(body["hint"]), runbook=str(body["runbook"]))
    if demo:
        click.echo(_DEMO_MARK)
    again = _again(given, target, demo=demo)
    click.echo(f"the node runs (pid {node.pid}); evidence: {chosen.signals.output_directory}")
    click.echo(f"stop it: stella signals stop{again}")
    if body["waiting"]:
        raise TryAgain(
            f"not ready yet: {', '.join(body['waiting'])}",
            hint=f"stella signals health{again}; logs are in {chosen.state / 'logs'}",
            runbook="health-checks",
        )
    # The node goes on as init's child; nobody here waits for it.
    node.returncode = 0


def _tell(fd: int, body: dict[str, object]) -> None:
    with suppress(OSError):
        os.write(fd, json.dumps(body).encode() + b"\n")
        os.close(fd)


def _stderr_is_journal() -> bool:
    """Return whether stderr is the systemd journal (JOURNAL_STREAM, systemd.exec(5))."""
    with suppress(OSError):
        status = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False
