"""An answer of `inspect` for people: what was seen, then for each kind whether that is all."""

from __future__ import annotations

from collections.abc import Iterator

import click

from stella_cli import console
from stella_cli.console import printable
from stella_cli.inspection.answer import Answer, KindAnswer, Moment, Row
from stella_cli.inspection.sightings import COLUMNS
from stella_cli.inspection.watch import Scope, spans

_NOUNS = {"image": "Image", "container": "Container", "name": "Images and pods named"}
_HEADINGS = {"seen_as": "seen as", "build_id": "build-id", "asked_for": "asked for"}


def show(answer: Answer) -> None:
    """Print the answer."""
    click.secho(f"{_NOUNS[answer.kind]} {printable(answer.asked)}", bold=True)
    for name, text in _facts(answer):
        click.echo(f"  {name:<9} {printable(text)}")
    for kind in answer.kinds:
        click.echo()
        _kind(kind, answer)
    if answer.seen.first:
        click.echo()
        click.echo(f"A line is proved to others with its place: stella signals prove {answer.seen.first.proof}")


def _facts(answer: Answer) -> Iterator[tuple[str, str]]:
    seen, source = answer.seen, answer.evidence
    if seen.first and seen.last:
        where = spans(part.chunk for part in seen.chunks)
        yield "Seen", f"{_events(seen.events)}, {_when(seen.first)} to {_when(seen.last)}, in {where}"
        for row in seen.containers:
            thing = row.thing
            names = [thing[key] for key in ("container_id", "pod", "image_name") if key in thing]
            image = thing.get("image_digest", "")
            of = f", image {image}" if image and answer.kind != "image" else ""
            yield "", f"{' '.join(names) or 'no container'}{of}: {_events(row.events)}, {_span(row)}"
        if seen.throttled:
            yield "", f"{_events(seen.throttled)} more of it were dropped by the limit of each container (rate_limit)"
        if seen.by_container:
            yield "", f"{_events(seen.by_container)} of these by their container: the image was not known yet"
        if seen.more_containers:
            yield "", f"and {seen.more_containers} more containers"
    else:
        yield "Seen", "nothing"
    yield "Evidence", f"{source.path}: {_verdict(answer)}"
    yield "Watched", _watched(answer)
    for text in _scope(answer.scope):
        yield "Scope", text
    if seen.unreadable:
        yield "Note", f"{_events(seen.unreadable)} could not be read, or are of a type of a later release"


def _verdict(answer: Answer) -> str:
    source = answer.evidence
    part = ", a part of the chain" if source.state == "range" else ""
    text = f"chunks {source.first_chunk} to {source.last_chunk}{part} of node {source.node}, "
    if not source.valid:
        told = source.fault
        where = f"chunk {told.chunk}: " if told and told.chunk is not None else ""
        return f"{text}NOT VALID: {where}{told.message if told else 'it has a fault'}"
    return f"{text}verified"


def _watched(answer: Answer) -> str:
    source = answer.evidence
    text = f"{source.start[:19]}Z to {source.end[:19]}Z, {source.lines} events of all processes"
    if source.open_chunk is not None:
        text += f"; chunk {source.open_chunk} is still open and not signed: what it shows is here, its silence is not"
    return text


def _scope(scope: Scope) -> Iterator[str]:
    if scope.stand_in:
        yield f"DEMO: {scope.stand_in} stands in for a kernel"
    if scope.targets:
        yield f"these targets alone: {_list(scope.targets)}"
    else:
        yield "every process of the node"
    if scope.paths_allow or scope.paths_deny:
        allowed = f"under {_list(scope.paths_allow)}" if scope.paths_allow else "of every path"
        yield f"files {allowed}" + (f", not under {_list(scope.paths_deny)}" if scope.paths_deny else "")
    if scope.functions:
        yield f"functions of {_list(scope.functions)}"
    if scope.networks_allow or scope.networks_deny:
        allowed = f"with {_list(scope.networks_allow)}" if scope.networks_allow else "with every network"
        yield f"connections {allowed}" + (f", not with {_list(scope.networks_deny)}" if scope.networks_deny else "")


def _list(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")


def _kind(kind: KindAnswer, answer: Answer) -> None:
    name = "TLS" if kind.kind == "tls" else kind.kind.capitalize()
    if not kind.events:
        click.secho(f"{name}: none seen", bold=True)
    else:
        click.secho(f"{name}: {_events(kind.events)}, {kind.things} different", bold=True)
        _rows(kind)
    told = answer.seen.events > 0 and kind.events > 0
    match kind.complete.verdict:
        case "holds":
            words = "This is all of it" if told else "You can believe it"
            words += ", within the scope"
            click.secho(f"  {words}: ", fg="green", nl=False)
            click.echo(_watching(kind))
        case "limited":
            words = "There may be more" if told else "Believe it with these doubts"
            click.secho(f"  {words}:", fg="yellow")
        case "void":
            words = "There may be more, of any amount" if told else "This says nothing"
            click.secho(f"  {words}:", fg="red")
    for doubt in kind.complete.doubts:
        click.echo(f"    - {printable(doubt.message)}")
    if kind.limits and kind.complete.verdict != "void":
        click.echo(f"  Seen are {kind.limits}.")


def _rows(kind: KindAnswer) -> None:
    names = _columns(kind)
    sizes = [name for name in ("bytes", "calls") if any(getattr(row, name) is not None for row in kind.rows)]
    table = []
    for row in kind.rows:
        cells = [str(row.events), *(str(getattr(row, name) or "") for name in sizes)]
        cells += [row.thing.get(name, "") for name in names]
        table.append([*cells, _when(row.first), _when(row.last), row.first.proof])
    headings = ["events", *sizes, *(_HEADINGS.get(name, name) for name in names)]
    console.table([*headings, "first", "last", "proof"], table)
    if kind.more.things:
        click.echo(f"  and {kind.more.things} more, {_events(kind.more.events)} (--top {kind.things} lists them)")
    if kind.more.unnamed_events:
        click.echo(f"  and {_events(kind.more.unnamed_events)} of still others, counted only")


def _columns(kind: KindAnswer) -> list[str]:
    found = {name for row in kind.rows for name in row.thing}
    return [name for name in COLUMNS[kind.kind] if name in found]


def _watching(kind: KindAnswer) -> str:
    if not kind.probes:
        return "what was asked for was watched all the time, and nothing was lost."
    return f"{_probes(kind)} watched all the time, and nothing was lost."


def _probes(kind: KindAnswer) -> str:
    return ", ".join(kind.probes) if len(kind.probes) < 3 else f"{', '.join(kind.probes[:-1])} and {kind.probes[-1]}"


def _when(moment: Moment) -> str:
    return moment.at or f"{moment.ts_ns / 1e9:.3f} s after boot {moment.boot_id[:8]}"


def _span(row: Row) -> str:
    return f"{_when(row.first)} to {_when(row.last)}"


def _events(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"
