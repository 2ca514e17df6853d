"""`stella signals tail`: the enriched stream as it passes, for people or byte for byte."""

from __future__ import annotations

import contextlib
import difflib
import select
import sys
import time
from collections.abc import AsyncIterator

import anyio
import click

from stella_cli import event_rows, failure, gateway
from stella_cli.settings import Settings
from stella_shared import clock, subjects
from stella_shared.bus import Bus
from stella_shared.config import BusTls, BusUser, bus_url, bus_user
from stella_shared.errors import NotFound, TryAgain, UsageError
from stella_shared.events import EVENT_TYPES
from stella_shared.evidence import compressed


def run(settings: Settings, types: list[str], count: int | None, form: str | None) -> None:
    """Write events to stdout until `count`, Ctrl-C, or until nobody reads."""
    for name in types:
        if name not in EVENT_TYPES:
            near = difflib.get_close_matches(name, EVENT_TYPES, 1)
            raise UsageError(
                f"there is no event type {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                hint="the types are " + ", ".join(EVENT_TYPES),
            )
    as_table = form == "table" or (form is None and sys.stdout.isatty())
    try:
        anyio.run(_tail, settings, types, count, as_table)
    except KeyboardInterrupt:
        return
    except BaseExceptionGroup as group:
        raise failure.leaf(group) from group


async def connected(
    stack: contextlib.AsyncExitStack, url: str, *, name: str, account: BusUser | None, tls: BusTls, seconds: float
) -> Bus:
    """Return a connection that `stack` closes.  Raises `TryAgain` when none stands after `seconds`."""
    try:
        # A server that never answers must not keep a person waiting, whatever the client library does.
        with anyio.fail_after(seconds + 1.0):
            return await stack.enter_async_context(
                Bus.connect(url, name=name, account=account, tls=tls, patience_seconds=seconds)
            )
    except TimeoutError:
        raise TryAgain(
            f"no NATS server answers at {url}", hint="stella signals health", runbook="health-checks"
        ) from None


async def lines(bus: Bus, types: list[str]) -> AsyncIterator[bytes]:
    """Yield evidence lines as they pass, of `types` or of all types, without their line ends."""
    subject = subjects.enriched("*", types[0] if len(types) == 1 else "*")
    async for message in bus.tail(subject):
        kind = message.subject.rpartition(".")[2]
        if kind == subjects.LEDGER_TYPE or (types and kind not in types):
            continue
        # What is no frame was not put there by an enricher, and the signer says so.
        with contextlib.suppress(ValueError):
            for line in compressed.unpack(message.data).splitlines():
                yield line


async def _tail(settings: Settings, types: list[str], count: int | None, as_table: bool) -> None:
    url, account = where(settings)
    async with contextlib.AsyncExitStack() as stack:
        try:
            bus = await connected(stack, url, name="tail", account=account, tls=settings.signals.bus.tls, seconds=2.0)
        except TryAgain:
            if gateway.running_node(settings) is None and not settings.signals.bus.url:
                raise NotFound(
                    f"no node runs on {settings.state}", hint="start one: sudo stella signals start"
                ) from None
            raise
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_end_with_reader)
            await _show(bus, types, count, as_table)
            tasks.cancel_scope.cancel()


async def _show(bus: Bus, types: list[str], count: int | None, as_table: bool) -> None:
    if as_table:
        click.secho(event_rows.heading(), bold=True)
    boot_unix_ns = time.time_ns() - clock.boottime_ns()
    stdout = sys.stdout.buffer
    shown = 0
    async for line in lines(bus, types):
        if as_table:
            click.echo(event_rows.row(line, boot_unix_ns))
        else:
            stdout.write(line + b"\n")
            stdout.flush()
        shown += 1
        if shown == count:
            return


async def _end_with_reader() -> None:
    """Raise `BrokenPipeError` once nobody reads stdout any more, also while no events come."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    while True:
        if any(what & select.POLLERR for _, what in poll.poll(0)):
            raise BrokenPipeError
        await anyio.sleep(0.3)


def where(settings: Settings) -> tuple[str, BusUser | None]:
    """Return URL and account for reading.  The embedded server lets anybody here read, by no name."""
    node = gateway.running_node(settings)
    if settings.signals.bus.credentials_file:
        return bus_url(settings.signals), bus_user(settings.signals, "reader")
    return (node.bus_url if node else bus_url(settings.signals)), None
