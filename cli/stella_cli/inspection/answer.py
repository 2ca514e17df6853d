"""The answer of `inspect`: evidence is verified, scanned for the subject, and weighed.  No network, ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from stella_cli.inspection.scan import Scan
from stella_cli.inspection.sightings import COLUMNS, CONTAINER_COLUMNS, Place, Sightings, Thing
from stella_cli.inspection.subject import Subject
from stella_cli.inspection.watch import (
    SENSES,
    Belief,
    Chunk,
    Clock,
    Scope,
    believe,
    filtered_by_choice,
    scope_of,
    unnamed_doubts,
)
from stella_shared.errors import NotFound, NotPermitted, TryAgain, UsageError
from stella_shared.evidence import archive, canonical, names
from stella_shared.evidence.directory import read
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.report import ARCHIVED, UNSIGNED, ChainReport, Fault
from stella_shared.evidence.verify import verify_chain
from stella_shared.evidence.vouching import Trust

FORMAT: Final = 1
_UNNAMED_SHOWN: Final = 100

Progress = Callable[[int, int], None]


class Moment(msgspec.Struct, frozen=True):
    """An event's line and time.  `at` is UTC by the signer's clock, good to a second or two; `ts_ns` is exact.

    `proof` is what `stella signals prove` takes: chunk and line; `signed` is false while nothing vouches for it.
    """

    at: str
    ts_ns: int
    boot_id: str
    chunk: int
    line: int
    proof: str
    signed: bool


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that was done.  `thing` has the columns of its kind; `bytes` is of TLS, `calls` of functions."""

    thing: dict[str, str]
    events: int
    first: Moment
    last: Moment
    bytes: int | None = None
    calls: int | None = None


class More(msgspec.Struct, frozen=True):
    """What is not listed: `things` different ones with `events` events, and `unnamed_events` not told apart."""

    things: int
    events: int
    unnamed_events: int


class KindAnswer(msgspec.Struct, frozen=True):
    """Everything about one kind: what was seen, and how far that is all."""

    kind: str
    events: int
    things: int
    rows: list[Row]
    more: More
    probes: list[str]
    limits: str
    complete: Belief


class ChunkSeen(msgspec.Struct, frozen=True):
    """A chunk that holds events of the subject, and when it was open; no times and status for the open one."""

    chunk: int
    events: int
    start: str = ""
    end: str = ""
    status: str = ""


class Seen(msgspec.Struct, frozen=True):
    """The subject as a whole.  `chunks` are those that hold its events.

    `by_container` of its events do not name the image themselves: other lines of the same container do.  `throttled`
    events of it were dropped by the limit of each container; they are among the losses.
    """

    events: int
    first: Moment | None
    last: Moment | None
    chunks: list[ChunkSeen]
    containers: list[Row]
    more_containers: int
    by_container: int
    throttled: int
    unreadable: int


class Source(msgspec.Struct, frozen=True):
    """The evidence that was read."""

    path: str
    valid: bool
    fault: Fault | None
    chain_id: str
    node: str
    state: str
    first_chunk: int
    last_chunk: int
    lines: int
    start: str
    end: str
    open_chunk: int | None
    filtered_by_choice: int
    archived: list[int]
    unsigned: list[int]


class Answer(msgspec.Struct, frozen=True):
    """The JSON of `stella signals inspect --format json`."""

    format: int
    kind: str
    asked: str
    evidence: Source
    scope: Scope
    seen: Seen
    kinds: list[KindAnswer]
    unnamed: dict[str, int]
    unnamed_containers: list[str]


def inspect(
    path: Path,
    subject: Subject,
    *,
    trust: Trust | None,
    head: Path | None,
    own: bool,
    top: int,
    verifying: Progress | None,
    scanning: Progress | None,
) -> Answer:
    """Return what the evidence at `path` (a directory or an archive) says of the subject.

    Raises as `verify_chain` does, and `TryAgain` when a cleanup takes away what is being read.
    """
    with _directory(path) as (directory, strange):
        report = verify_chain(directory, trust=trust, head=head, own=own, progress=verifying)
        if strange:
            fault = Fault("inserted", None, f"{strange[0]} is no file of an evidence directory")
            report = msgspec.structs.replace(report, valid=False, faults=[*report.faults, fault])
        chunks = list(_chunks(directory, report))
        scan = Scan(subject, Sightings())
        _scan(directory, report, scan, scanning or (lambda done, total: None))
    return _answer(path, subject, report, chunks, scan=scan, top=top)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Give the evidence directory: the path itself, or what an archive holds, unpacked for the length of the block."""
    if not path.exists():
        raise NotFound(f"no evidence at {path}", hint="name an evidence directory, or a .tar.gz of one")
    if path.is_dir():
        yield path, []
        return
    if not path.name.endswith(archive.SUFFIXES):
        raise UsageError(f"{path} is neither a directory nor one of {', '.join(archive.SUFFIXES)}")
    with archive.unpacked(path) as inside:
        yield inside.directory, inside.strange


def _chunks(directory: Path, report: ChainReport) -> Iterator[Chunk]:
    """Yield each chunk's ledger.  One that cannot be read has its fault in the report already."""
    for chunk in report.chunks:
        with contextlib.suppress(OSError, ValueError):
            ledger = canonical.loads(read(directory / names.chunk_file(chunk.index, names.LEDGER)), Ledger)
            yield Chunk(chunk.index, chunk.status, ledger)


def _scan(directory: Path, report: ChainReport, scan: Scan, progress: Progress) -> None:
    files = [(c.index, directory / names.chunk_file(c.index, names.DATA)) for c in report.chunks]
    if report.open:
        files.append((report.open.index, directory / names.chunk_file(report.open.index, names.OPEN_DATA)))
    there = [(index, path) for index, path in files if path.exists()]
    total = sum(path.stat().st_size for _, path in there)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done = min(done + size, total)
        progress(done, total)

    try:
        for place, (index, path) in enumerate(there):
            try:
                scan.read(index, path, count)
            except FileNotFoundError:
                # The open chunk was closed meanwhile, under another name.
                there[place] = index, directory / names.chunk_file(index, names.DATA)
                scan.read(*there[place], count)
        scan.settle(there, count)
    except FileNotFoundError as e:
        raise TryAgain(f"{e.filename} went away while it was read", hint="ask again") from None
    except PermissionError as e:
        raise NotPermitted(f"{e.filename}: {e.strerror}", hint="run as the owner of the evidence, or as root") from None


def _answer(path: Path, subject: Subject, report: ChainReport, chunks: list[Chunk], *, scan: Scan, top: int) -> Answer:
    clock = Clock(chunks)
    signed = {chunk.index for chunk in report.chunks if chunk.status != UNSIGNED}

    def moment(place: Place) -> Moment:
        at = clock.text(place.boot_id, place.ts_ns)
        proof = f"{place.chunk}:{place.line}"
        return Moment(at, place.ts_ns, place.boot_id, place.chunk, place.line, proof, place.chunk in signed)

    def row(columns: tuple[str, ...], key: tuple[str, ...], thing: Thing, kind: str = "") -> Row:
        values = {name: value for name, value in zip(columns, key, strict=True) if value}
        sizes = {"tls": (thing.amount, None), "functions": (None, thing.amount or None)}.get(kind, (None, None))
        return Row(values, thing.count, moment(thing.first), moment(thing.last), *sizes)

    found = scan.found
    kinds = []
    what = "container" if subject.kind == "container" else "image"
    unnamed = unnamed_doubts(scan.unnamed, scan.unnamed_containers, what)
    for name, kind in found.kinds.items():
        listed = kind.top(top)
        rest = sum(thing.count for thing in kind.things.values()) - sum(thing.count for _, thing in listed)
        kinds.append(
            KindAnswer(
                name,
                kind.events,
                len(kind.things),
                [row(COLUMNS[name], key, thing, name) for key, thing in listed],
                More(len(kind.things) - len(listed), rest, kind.unnamed_events),
                list(SENSES[name].probes),
                SENSES[name].limits,
                believe(name, report, chunks, clock, unnamed=unnamed),
            )
        )
    containers = found.containers.top(top)
    windows = {chunk.index: chunk for chunk in chunks}
    return Answer(
        FORMAT,
        subject.kind,
        subject.asked,
        _source(path, report, chunks),
        scope_of(chunks),
        Seen(
            found.all.count if found.all else 0,
            moment(found.all.first) if found.all else None,
            moment(found.all.last) if found.all else None,
            [_chunk_seen(index, events, windows.get(index)) for index, events in sorted(found.events_by_chunk.items())],
            [row(CONTAINER_COLUMNS, key, thing) for key, thing in containers],
            len(found.containers.things) - len(containers),
            scan.later,
            found.throttled,
            found.unreadable,
        ),
        kinds,
        scan.unnamed,
        scan.unnamed_containers[:_UNNAMED_SHOWN],
    )


def _chunk_seen(index: int, events: int, chunk: Chunk | None) -> ChunkSeen:
    if chunk is None:
        return ChunkSeen(index, events)
    return ChunkSeen(index, events, chunk.ledger.window.start, chunk.ledger.window.end, chunk.status)


def _source(path: Path, report: ChainReport, chunks: list[Chunk]) -> Source:
    return Source(
        str(path),
        report.valid,
        report.faults[0] if report.faults else None,
        report.chain_id,
        report.node,
        report.state,
        report.first,
        report.chunks[-1].index if report.chunks else report.last,
        report.lines,
        chunks[0].ledger.window.start if chunks else "",
        chunks[-1].ledger.window.end if chunks else "",
        report.open.index if report.open else None,
        filtered_by_choice(chunks),
        [c.index for c in report.chunks if c.status == ARCHIVED],
        [c.index for c in report.chunks if c.status == UNSIGNED],
    )
