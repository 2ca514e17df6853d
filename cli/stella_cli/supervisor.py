"""The supervisor: starts every part of a node, keeps it running, and ends it in order.

    nats → signer → enrichers → collector → gateway        start: each when the one before it stands
    collector → enrichers → signer → gateway → nats        stop: each empties its queue before it ends

The one module that starts services.  Each is a process in a session of its own, so Ctrl-C reaches the
supervisor alone; the kernel kills them all if the supervisor dies.  A part is ready when its heartbeat says
so.  A part that dies is started again, sooner at first and later when it keeps dying, while the others go on.
A part that ends with exit code 2, 3 or 4 (configuration, permission, no key) would do so again: it stays down
and its reason is told.  While the node starts that ends the start, except for the gateway; later the others
go on, unless it is the collector that lost its permission.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import anyio.abc
import msgspec

from stella_cli import bus_watch, nats_server, node_file, process, reloading
from stella_cli.node_file import ChildEntry, NodeFile
from stella_cli.process import Child, Identity
from stella_cli.service_log import Line, ServiceLog
from stella_cli.tailing import connected
from stella_shared import clock, lifecycle
from stella_shared.bus import Bus
from stella_shared.config import Signals, bus_url, bus_user, node_name
from stella_shared.errors import ConfigError, NotFound, NotPermitted, StellaError, TryAgain
from stella_shared.wire import Beat

READY_SECONDS: Final = 60.0
#: Longer than any part gives itself to finish (the signer: 20 s and the last signature), so that only one that
#: hangs is killed.
STOP_SECONDS: Final = 30.0
BUS_SECONDS: Final = 10.0
#: How often the parts' logs are looked at; an end of one is told with its last words at once.
LOG_SECONDS: Final = 0.5
BACKOFF_FIRST_SECONDS: Final = 0.2
BACKOFF_LAST_SECONDS: Final = 5.0
#: A part that ran this long is taken as healthy again: the next death starts with the short wait.
HEALTHY_SECONDS: Final = 30.0
_PERMANENT: Final = (2, 3, 4)
#: What a part may keep of root's powers; the collector itself gives up more of these as it needs less.  Files of other
#: owners (a home directory, a virtual environment in it) must stay readable for all.
_KEEP: Final[dict[str, tuple[int, ...]]] = {
    "collector": (
        process.CAP_DAC_OVERRIDE,
        process.CAP_DAC_READ_SEARCH,
        process.CAP_SETPCAP,
        process.CAP_SYS_PTRACE,
        process.CAP_SYS_ADMIN,
        process.CAP_PERFMON,
        process.CAP_BPF,
    ),
    "nats": (process.CAP_DAC_OVERRIDE,),
    "signer": (process.CAP_DAC_OVERRIDE,),
    "gateway": (process.CAP_DAC_OVERRIDE,),
    "enricher": (process.CAP_DAC_OVERRIDE, process.CAP_DAC_READ_SEARCH, process.CAP_SYS_PTRACE),
}

Say = Callable[[Literal["info", "warning", "error"], str], None]
PartState = Literal["waiting", "starting", "ready", "restarting", "failed", "stopped"]


@dataclass(frozen=True)
class Plan:
    """What is to run: the effective configuration and where things are."""

    signals: Signals
    state: Path
    env: Mapping[str, str]
    config_name: str
    #: Reads the configuration anew, as the start did.
    load: Callable[[], Signals]
    #: Whether a hang-up asks for a reload; else the terminal has gone, and the node with it.
    hangup_reloads: bool = False
    replay: Path | None = None

    @property
    def gateway_url(self) -> str:
        """Where the gateway answers; "" when there is none."""
        metrics = self.signals.metrics
        host = f"[{metrics.address}]" if ":" in metrics.address else metrics.address
        return f"http://{host}:{metrics.port}" if metrics.enabled else ""


@dataclass(eq=False)
class Part:
    """One process of the node, through all its lives."""

    service: str
    name: str
    instance: str
    command: list[str]
    log: ServiceLog
    state: PartState = "waiting"
    child: Child | None = None
    beat: Beat | None = None
    heard: float = 0.0
    ready_since: float = 0.0
    restarts: int = 0
    error: str = ""
    hint: str = ""
    exit_code: int = 0
    #: It was asked to end, to start anew with another configuration.
    renewing: bool = False
    stop: anyio.Event = field(default_factory=anyio.Event)
    gone: anyio.Event = field(default_factory=anyio.Event)


class Supervisor:
    """Runs one node.  The caller holds the state directory's lock and has written the configuration."""

    def __init__(self, plan: Plan, say: Say, show_log: Callable[[Part, Line], None]) -> None:
        self.plan = plan
        self.parts: list[Part] = []
        self.killed: list[str] = []
        self.bus: Bus | None = None
        self.say = say
        self._show_log = show_log
        self._stopping = anyio.Event()
        self._hurry = anyio.Event()
        self._reload = anyio.Event()
        self._failure: StellaError | None = None
        self._started_at = time.time()
        self._bus_url = bus_url(plan.signals)

    def part(self, service: str) -> Part | None:
        """Return the first part that is `service`."""
        return next((p for p in self.parts if p.service == service), None)

    def stop(self) -> None:
        """Ask for an orderly end; asked twice, for one at once."""
        if self._stopping.is_set():
            self._hurry.set()
        else:
            lifecycle.notify("STOPPING=1")
        self._stopping.set()

    async def run(self, on_ready: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Bring the node up, call `on_ready`, and return when it has been stopped and every part has ended.

        Raises what kept the node from running; every part has ended then too.
        """
        async with anyio.create_task_group() as tasks, contextlib.AsyncExitStack() as stack:
            tasks.start_soon(self._watch_signals)
            tasks.start_soon(self._follow_logs)
            tasks.start_soon(_tell_manager)
            try:
                await self._bring_up(tasks, stack)
                if not self._stopping.is_set():
                    tasks.start_soon(on_ready)
                    tasks.start_soon(self._reload_when_asked)
                    await self._stopping.wait()
            except StellaError as e:
                self._failure = e
                self._stopping.set()
            finally:
                with anyio.CancelScope(shield=True):
                    await self._bring_down()
            for part in self.parts:
                self._read_log(part)
            tasks.cancel_scope.cancel()
        node_file.remove(self.plan.state)
        if self._failure is not None:
            raise self._failure

    # ---- up

    async def _bring_up(self, tasks: anyio.abc.TaskGroup, stack: contextlib.AsyncExitStack) -> None:
        signals = self.plan.signals
        embedded = None
        if not signals.bus.url:
            embedded = nats_server.prepare(self.plan.state, signals.bus)
            self._bus_url = embedded.url
            for durable in nats_server.mend(embedded.store):
                self.say("warning", f"the bus has lost what {durable} had finished, as after a power cut: once more")
            await self._start(tasks, [self._make("nats", "nats", embedded.command)])
            await self._bus_answers()
        account = bus_user(signals, "operator")
        self.bus = await connected(
            stack, self._bus_url, name="supervisor", account=account, tls=signals.bus.tls, seconds=BUS_SECONDS
        )
        await self._make_streams()
        if embedded is not None:
            tasks.start_soon(bus_watch.watch, self, self.bus, embedded)
        tasks.start_soon(self._listen, self.bus)
        enrichers = [self._make_service("enricher", n) for n in range(1, signals.enrichers + 1)]
        await self._start(tasks, [self._make_service("signer")])
        await self._start(tasks, enrichers)
        await self._settled()
        last = [self._make_service("collector")]
        if signals.metrics.enabled:
            last.append(self._make_service("gateway"))
        await self._start(tasks, last)
        await self._settled()

    def _make(self, service: str, name: str, command: list[str], instance: str = "") -> Part:
        part = Part(service, name, instance, command, ServiceLog(self.plan.state / "logs" / f"{name}.log"))
        self.parts.append(part)
        return part

    def _make_service(self, service: str, number: int = 0) -> Part:
        name = f"{service}-{number}" if number else service
        node = node_name(self.plan.signals)
        instance = f"{node}-{number}" if number else node
        # -P: a module in the directory we were called from must never stand in for a service.
        command = [sys.executable, "-P", "-m", f"stella_{service}"]
        command += ["--config", str(effective_config_path(self.plan.state)), "--instance", instance]
        if service == "collector" and self.plan.replay is not None:
            command += ["--replay", str(self.plan.replay)]
        return self._make(service, name, command, instance)

    async def _start(self, tasks: anyio.abc.TaskGroup, parts: list[Part]) -> None:
        for part in parts:
            if not self._stopping.is_set():
                tasks.start_soon(self._keep, part)

    async def _bus_answers(self) -> None:
        """Wait until the embedded server listens.  Raises when it ended instead."""
        part = self.parts[0]
        host, port = self._bus_url.removeprefix("nats://").split(":")
        with anyio.move_on_after(READY_SECONDS):
            while not self._stopping.is_set():
                if part.restarts or part.state == "failed":
                    raise TryAgain(
                        f"the embedded nats-server does not start: {part.error}",
                        hint=f"its log is {part.log.path}",
                    )
                with contextlib.suppress(OSError):
                    async with await anyio.connect_tcp(host, int(port)):
                        part.state = "ready"
                        return
                await anyio.sleep(0.02)

    async def _make_streams(self) -> None:
        """Make the streams; JetStream may still be reading its store when the server already answers."""
        deadline = time.monotonic() + READY_SECONDS
        while self.bus is not None and not self._stopping.is_set():
            try:
                await self.bus.ensure_streams()
                return
            except TryAgain:
                if time.monotonic() > deadline:
                    raise
                await anyio.sleep(0.2)

    async def _settled(self) -> None:
        """Wait until each started part is ready.  Raises when one that a node needs will never be."""
        deadline = time.monotonic() + READY_SECONDS
        while not self._stopping.is_set():
            for part in self.parts:
                if part.state == "failed" and part.service != "gateway":
                    raise _failure_of(part)
            waiting = [p for p in self.parts if p.state not in ("ready", "failed")]
            gateway = self.part("gateway")
            if not waiting and gateway is not None and gateway.state == "ready":
                # Whoever asks it from now on should get an answer about all: each has beaten since it listens.
                waiting = [p for p in self.parts if p.state == "ready" and 0.0 < p.heard < gateway.ready_since]
            if not waiting:
                return
            if time.monotonic() > deadline:
                for part in waiting:
                    reason = (part.beat.reason if part.beat else "") or part.error or "no heartbeat yet"
                    self.say("warning", f"{part.name} is not ready: {reason}")
                return
            await anyio.sleep(0.02)

    # ---- keep

    async def _keep(self, part: Part) -> None:
        """Run one part until it is stopped: start, wait for its end, start again."""
        backoff = BACKOFF_FIRST_SECONDS
        try:
            while not part.stop.is_set():
                part.log.bound()
                began, former = time.monotonic(), part.child
                part.beat = None
                try:
                    part.child = Child(part.command, log=part.log.path, env=self.plan.env, keep=_KEEP.get(part.service))
                except OSError as e:
                    part.exit_code = NotPermitted.exit_code if isinstance(e, PermissionError) else NotFound.exit_code
                    part.error = f"cannot start {part.command[0]}: {e.strerror}"
                    self._give_up(part)
                    return
                if part.state != "restarting":
                    part.state = "starting"
                self._write_node_file()
                if part.service == "nats" and former is not None:
                    part.state = "ready"
                part.exit_code = await part.child.wait()
                part.error, part.hint = part.log.last_words()
                self._write_node_file()
                if part.stop.is_set():
                    return
                if part.renewing and part.exit_code == 0:
                    part.renewing = False
                    part.state = "starting"
                    continue
                if part.exit_code in _PERMANENT and part.service != "nats":
                    self._give_up(part)
                    return
                if time.monotonic() - began > HEALTHY_SECONDS:
                    backoff = BACKOFF_FIRST_SECONDS
                part.restarts += 1
                part.state = "restarting"
                self.say(
                    "warning",
                    f"{part.name} {how_it_ended(part.exit_code)}; starting it again in {backoff:.1f} s"
                    + (f" (it said: {part.error})" if part.exit_code > 0 else ""),
                )
                with anyio.move_on_after(backoff):
                    await part.stop.wait()
                backoff = min(BACKOFF_LAST_SECONDS, backoff * 2)
        finally:
            if part.state != "failed":
                part.state = "stopped"
            part.gone.set()

    def _give_up(self, part: Part) -> None:
        part.state = "failed"
        self.say("error", f"{part.name} cannot run: {part.error}")
        if part.service == "collector" and part.exit_code == NotPermitted.exit_code:
            self._failure = self._failure or _failure_of(part)
            self._stopping.set()

    async def _listen(self, bus: Bus) -> None:
        """Note each part's heartbeat; a part is ready from the first one that says it works."""
        async for beat in bus.beats():
            for part in self.parts:
                if part.child is None or (part.service, part.child.pid) != (beat.service, beat.pid):
                    continue
                part.beat = beat
                part.heard = time.monotonic()
                if beat.state in ("ok", "degraded") and part.state in ("starting", "restarting"):
                    if part.state == "restarting":
                        self.say("info", f"{part.name} is back (pid {beat.pid})")
                    part.state = "ready"
                    part.ready_since = part.heard

    async def _follow_logs(self) -> None:
        while True:
            for part in self.parts:
                self._read_log(part)
            await anyio.sleep(LOG_SECONDS)

    def _read_log(self, part: Part) -> None:
        for line in part.log.new_lines():
            self._show_log(part, line)

    # ---- another configuration

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload.wait()
            self._reload = anyio.Event()
            outcome = await reloading.apply(self)
            if outcome.ok:
                self.say("info", f"configuration taken up: {', '.join(outcome.changed) or 'nothing has changed'}")
            else:
                self.say("error", f"the changed configuration is refused: {outcome.error}")
            data = msgspec.json.format(msgspec.json.encode(outcome)) + b"\n"
            node_file.write_private(reloading.outcome_path(self.plan.state), data)

    def write(self, signals: Signals) -> None:
        """Write the configuration that parts read when they start or are asked to."""
        write_effective_config(self.plan.state, signals)

    def take(self, signals: Signals) -> None:
        """Go on with this configuration."""
        self.write(signals)
        self.plan = replace(self.plan, signals=signals)

    async def renew(self, service: str, seconds: float) -> None:
        """End and start each part of a service, one after the other.  Raises `TryAgain` for one that takes too long."""
        for part in [p for p in self.parts if p.service == service and p.child is not None]:
            former = part.child
            part.renewing = True
            if former is not None:
                former.send(signal.SIGTERM)
            with anyio.move_on_after(seconds) as scope:
                while part.child is former or part.state != "ready":
                    if part.state in ("failed", "stopped"):
                        raise TryAgain(f"{part.name} does not start with it: {part.error}", hint=part.hint)
                    await anyio.sleep(0.02)
            if scope.cancelled_caught:
                raise TryAgain(f"{part.name} has not come back in {seconds:.0f} s", hint=f"its log is {part.log.path}")

    async def _watch_signals(self) -> None:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        with anyio.open_signal_receiver(*numbers) as received:
            async for number in received:
                if number == signal.SIGUSR1 or (number == signal.SIGHUP and self.plan.hangup_reloads):
                    self._reload.set()
                    continue
                if self._stopping.is_set():
                    self.say("warning", "ending at once; the next start recovers what is on disk")
                else:
                    self.say("info", "stopping: intake first, then what is in flight, then the last chunk")
                self.stop()

    def _write_node_file(self) -> None:
        me = process.identity(os.getpid())
        children = [ChildEntry(p.name, p.child.identity) for p in self.parts if p.child and p.child.running]
        node_file.write(
            self.plan.state,
            NodeFile(
                who=me or Identity(os.getpid(), 0),
                boot_id=clock.boot_id(),
                started_at=self._started_at,
                config=self.plan.config_name,
                output_directory=self.plan.signals.output_directory,
                gateway_url=self.plan.gateway_url,
                bus_url=self._bus_url,
                demo=self.plan.replay is not None,
                children=children,
            ),
        )

    # ---- down

    async def _bring_down(self) -> None:
        """End every part, those that make work before those that do it; each works off what is queued for it."""
        await self._end("collector")
        await self._end("enricher")
        await self._end("signer")
        await self._end("gateway")
        await self._end("nats")

    async def _end(self, service: str) -> None:
        pairs = [(p, p.child) for p in self.parts if p.service == service and p.child is not None]
        for part, child in pairs:
            part.stop.set()
            child.send(signal.SIGTERM)
        with anyio.move_on_after(STOP_SECONDS):
            await _all_or(self._hurry, [part.gone for part, _ in pairs])
        for part, child in pairs:
            if not part.gone.is_set():
                child.send(signal.SIGKILL)
                self.killed.append(part.name)
                if not self._hurry.is_set():
                    self.say("warning", f"{part.name} did not end in {STOP_SECONDS:.0f} s and was killed")
                await part.gone.wait()


async def _tell_manager() -> None:
    """Tell a systemd that watches this node that its supervisor lives; the supervisor itself watches the parts."""
    while True:
        lifecycle.notify("WATCHDOG=1")
        await anyio.sleep(lifecycle.BEAT_SECONDS)


def effective_config_path(state: Path) -> Path:
    """Return where the configuration stands that all parts of the running node read."""
    return state / "run" / "signals.yaml"


def write_effective_config(state: Path, signals: Signals) -> None:
    """Write the configuration as merged from file, environment and flags: every part reads the same one."""
    text = msgspec.json.format(msgspec.json.encode({"signals": signals}))
    node_file.write_private(effective_config_path(state), text + b"\n")


def how_it_ended(code: int) -> str:
    """Say in words how a process ended."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"
    return "ended" if code == 0 else f"ended with exit code {code}"


def _failure_of(part: Part) -> StellaError:
    kinds: tuple[type[StellaError], ...] = (NotPermitted, NotFound)
    kind = next((k for k in kinds if k.exit_code == part.exit_code), ConfigError)
    return kind(f"{part.name} cannot run: {part.error}", hint=part.hint or f"its log is {part.log.path}")


async def _all_or(other: anyio.Event, events: list[anyio.Event]) -> None:
    """Return when all of `events` are set, or `other` is."""
    async with anyio.create_task_group() as tasks:

        async def first() -> None:
            await other.wait()
            tasks.cancel_scope.cancel()

        tasks.start_soon(first)
        for event in events:
            await event.wait()
        tasks.cancel_scope.cancel()
