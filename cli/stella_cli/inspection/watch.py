"""When and how the node watched, and what was lost meanwhile: out of the ledgers, which the signatures cover.  Pure.

A *doubt* is a reason for which something may have happened and not be in the evidence.  The *scope* is what was
asked to be watched: what lies outside is not in the evidence by choice, and that is no doubt.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from stella_shared.evidence.records import KERNEL_FILTER_PREFIX, Ledger
from stella_shared.evidence.report import ARCHIVED, INVALID, UNSIGNED, UNTRUSTED_KEY, ChainReport
from stella_shared.wire import LANE_KIND_NAMES, LANE_KINDS, UNNUMBERED_LOSSES

#: Batches come at least once a second: a longer silence is one.
_SILENCE_NS: Final = 3_000_000_000
_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_SHOWN_MAX: Final = 5
#: A collector's reason that is none: it looked for such processes all the time, and there was none to watch.
_NOBODY_YET: Final = "no target process uses a TLS library yet"


class Sense(NamedTuple):
    """What sees one kind of things: probes by name, the lanes its events take numbers in, and what never shows."""

    probes: tuple[str, ...]
    lanes: tuple[str, ...]
    limits: str = ""


#: Kind of things → what sees it.
SENSES: Final[dict[str, Sense]] = {
    "files": Sense(("sys_enter_openat",), ("syscall",), "opens by open, openat and openat2; not by io_uring"),
    "programs": Sense(
        ("sched_process_exec",), ("exec",), "programs that were started, and those that did something else that is here"
    ),
    "connections": Sense(
        ("libc_connect", "libc_accept", "inet_sock_set_state"),
        ("syscall", "sock", "uprobe"),
        "connects and accepts by system call or libc, states of TCP; not UDP without connect",
    ),
    "functions": Sense((), ("uprobe",), "the functions that were asked to be watched, and callers in recorded stacks"),
    "tls": Sense(
        ("openssl_read", "openssl_write"),
        ("uprobe",),
        "calls of OpenSSL where the collector found it; not Go's, rustls, GnuTLS or NSS, "
        "nor a library before it was found",
    ),
}

#: What the coverage's `io_uring` may name that this kind does not see.
PAST_THE_PROBES: Final[dict[str, tuple[str, ...]]] = {
    "files": ("open", "unknown"),
    "connections": ("connect", "accept", "unknown"),
}

Verdict = Literal["holds", "limited", "void"]


class Doubt(msgspec.Struct, frozen=True):
    """A reason not to take silence for absence.  `chunks` are those it concerns, [] for all."""

    code: str
    message: str
    chunks: list[int] = []


class Belief(msgspec.Struct, frozen=True):
    """How far the evidence about one kind is complete.

    `holds`: within the scope everything is here, and what is not here did not happen.
    `limited`: it may lack something; `doubts` say what, and where.  `void`: it says nothing of this kind.
    """

    verdict: Verdict
    doubts: list[Doubt]


class Scope(msgspec.Struct, frozen=True):
    """What was asked to be watched, by every coverage document that held.  Empty lists: everything."""

    targets: list[str]
    paths_allow: list[str]
    paths_deny: list[str]
    networks_allow: list[str]
    networks_deny: list[str]
    libraries: list[str]
    functions: list[str]
    stand_in: str


class Chunk(msgspec.Struct, frozen=True):
    """A chunk's ledger and what the verifier says of it."""

    index: int
    status: str
    ledger: Ledger


def _unix_ns(text: str) -> int:
    """Return an RFC 3339 time in ns; its fraction may have nine digits, which datetime would refuse."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC) - _EPOCH
    return int(seconds.total_seconds()) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)


class Clock:
    """Turns boot times into wall times: each chunk was closed, by the signer's clock, after its last batch.

    The chunk that was closed soonest after its last batch is nearest.  Good to a second or two.
    """

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._offsets: dict[str, int] = {}
        for chunk in chunks:
            window = chunk.ledger.window
            for boot in window.boots:
                try:
                    offset = _unix_ns(window.end) - int(boot.end_ns)
                except ValueError:
                    continue
                self._offsets[boot.boot_id] = min(offset, self._offsets.get(boot.boot_id, offset))

    def unix_ns(self, boot_id: str, ts_ns: int) -> int | None:
        """Return the wall time of an event, None for a boot that no closed chunk covers."""
        offset = self._offsets.get(boot_id)
        return None if offset is None else ts_ns + offset

    def text(self, boot_id: str, ts_ns: int) -> str:
        """Return it as UTC with seconds, "" where it is not known."""
        at = self.unix_ns(boot_id, ts_ns)
        if at is None:
            return ""
        return (_EPOCH + datetime.timedelta(seconds=at // 1_000_000_000)).strftime("%Y-%m-%dT%H:%M:%SZ")


def scope_of(chunks: Sequence[Chunk]) -> Scope:
    """Return what the coverage documents asked for, united over all of them."""

    def gather(read: Any) -> list[str]:
        return sorted({str(item) for document in documents for item in read(document) or ()})

    documents = [d for c in chunks for held in c.ledger.coverage if isinstance(d := held.document, dict)]
    filters = [f for d in documents if isinstance(f := d.get("filters"), dict)]

    def of_filters(name: str) -> list[str]:
        return sorted({str(item) for f in filters if isinstance(v := f.get(name), list) for item in v})

    return Scope(
        targets=gather(lambda d: [t.get("asked") for t in d.get("targets") or () if isinstance(t, dict)]),
        paths_allow=of_filters("paths_allow"),
        paths_deny=of_filters("paths_deny"),
        networks_allow=of_filters("networks_allow"),
        networks_deny=of_filters("networks_deny"),
        libraries=gather(lambda d: d.get("libraries")),
        functions=sorted({f"{name}{of}" for c in chunks for name, attached, of in _functions(c) if attached}),
        stand_in=next((str(d["stand_in"]) for d in documents if d.get("stand_in")), ""),
    )


def believe(kind: str, report: ChainReport, chunks: Sequence[Chunk], clock: Clock, *, unnamed: list[Doubt]) -> Belief:
    """Return how far the evidence is complete about one kind of things (`SENSES`).

    `unnamed` are those of `unnamed_doubts`.
    """
    void = [*_not_there(report, chunks), *_never_watched(kind, chunks)]
    doubts = [
        *_partly_watched(kind, chunks),
        *_past_the_probes(kind, chunks),
        *_lost(kind, chunks),
        *_unclean(chunks),
        *_pauses(chunks, clock),
        *_lines_elsewhere(report),
        *unnamed,
        *_unsigned(report),
    ]
    if void:
        return Belief("void", [*void, *doubts])
    return Belief("limited" if doubts else "holds", doubts)


def _not_there(report: ChainReport, chunks: Sequence[Chunk]) -> list[Doubt]:
    if not report.valid:
        first = report.faults[0]
        where = f"chunk {first.chunk}: " if first.chunk is not None else ""
        return [Doubt("not_valid", f"the evidence does not verify: {where}{first.message} ({first.code})")]
    if not chunks:
        return [Doubt("no_chunks", "there is no closed chunk yet")]
    if all(chunk.status == ARCHIVED for chunk in chunks):
        return [Doubt("archived", "the lines of every chunk are elsewhere")]
    return []


def _probes(chunk: Chunk, kind: str) -> list[tuple[str, bool, str]]:
    """Return (name, attached, reason or scope) of the probes of a kind, in every document that held in a chunk."""
    if kind == "functions":
        return [(name, attached, "" if attached else of) for name, attached, of in _functions(chunk)]
    found = []
    for held in chunk.ledger.coverage:
        document = held.document if isinstance(held.document, dict) else {}
        for row in document.get("probes") or ():
            if isinstance(row, dict) and row.get("name") in SENSES[kind].probes:
                attached = row.get("attached") is True
                said = str((row.get("scope") if attached else row.get("reason")) or "")
                if said == _NOBODY_YET:
                    attached, said = True, "process"
                found.append((str(row["name"]), attached, said))
    return found


def _functions(chunk: Chunk) -> list[tuple[str, bool, str]]:
    """Return (file, watched, how many functions of which image, or why none) of files asked to be watched."""
    found = []
    for held in chunk.ledger.coverage:
        document = held.document if isinstance(held.document, dict) else {}
        for row in document.get("binaries") or ():
            if isinstance(row, dict) and row.get("mode") in ("trace", "count"):
                count = row.get("functions")
                attached = isinstance(count, int) and count > 0
                image = f", of image {row['image']}" if row.get("image") else ""
                said = f" ({count}{image})" if attached else str(row.get("reason") or "")
                found.append((str(row.get("binary")), attached, said))
    return found


def _busy(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks in which a collector ran at all."""
    return [chunk for chunk in chunks if chunk.ledger.runs]


def _never_watched(kind: str, chunks: Sequence[Chunk]) -> list[Doubt]:
    rows = [row for chunk in chunks for row in _probes(chunk, kind)]
    if not _busy(chunks):
        return [Doubt("no_collector", "no collector ran in this time")]
    if not rows:
        return [Doubt("not_watched", f"nothing watched {kind}: no probe for it is in the coverage")]
    if not any(attached for _, attached, _ in rows):
        reasons = sorted({f"{name} ({reason or 'no reason given'})" for name, _, reason in rows})
        return [Doubt("never_attached", f"never attached: {', '.join(reasons)}")]
    return []


def _partly_watched(kind: str, chunks: Sequence[Chunk]) -> list[Doubt]:
    missing: dict[tuple[str, str], list[int]] = {}
    by_process: list[int] = []
    for chunk in _busy(chunks):
        rows = _probes(chunk, kind)
        for name, attached, said in rows:
            if not attached:
                missing.setdefault((name, said), []).append(chunk.index)
        if any(attached and said == "process" for _, attached, said in rows):
            by_process.append(chunk.index)
    watched = {name for chunk in chunks for name, attached, _ in _probes(chunk, kind) if attached}
    found = [
        Doubt("not_attached", f"{name} was not attached in {spans(where)}: {reason or 'no reason given'}", where)
        for (name, reason), where in sorted(missing.items())
        if watched
    ]
    if by_process:
        text = "was watched process by process: what a process did before it was found (some 250 ms) is not here"
        found.append(Doubt("by_process", f"{spans(by_process)}: it {text}", by_process))
    return found


def _past_the_probes(kind: str, chunks: Sequence[Chunk]) -> list[Doubt]:
    """Return what watched programs did through io_uring, which leaves no line of this kind (the coverage says it)."""
    asked: dict[str, list[int]] = {}
    for chunk in _busy(chunks):
        for held in chunk.ledger.coverage:
            document = held.document if isinstance(held.document, dict) else {}
            told = document.get("io_uring")
            told = list(told) if isinstance(told, list) else []
            if "ring" in told and _tells_rings_only(str(document.get("kernel_release"))):
                told.append("unknown")
            for what in told:
                if what in PAST_THE_PROBES.get(kind, ()) and chunk.index not in asked.setdefault(str(what), []):
                    asked[str(what)].append(chunk.index)
    known = {what: where for what, where in asked.items() if what != "unknown"}
    found = [
        Doubt("io_uring", f"{spans(where)}: watched programs used io_uring to {what}, which leaves no line here", where)
        for what, where in sorted(known.items())
    ]
    if "unknown" in asked:
        where = asked["unknown"]
        found.append(Doubt("io_uring", f"{spans(where)}: what io_uring was used for is not known", where))
    return found


def _tells_rings_only(release: str) -> bool:
    """Return whether a kernel tells that rings are made, and not what is asked for through them (before 6.4)."""
    parts = re.match(r"(\d+)\.(\d+)", release)
    return parts is not None and (int(parts[1]), int(parts[2])) < (6, 4)


def _lost(kind: str, chunks: Sequence[Chunk]) -> list[Doubt]:
    lanes = {LANE_KIND_NAMES.index(name) for name in SENSES[kind].lanes}
    where: list[int] = []
    total = 0
    causes: set[str] = set()
    missed: list[int] = []
    for chunk in chunks:
        lost = sum(row.lost for run in chunk.ledger.runs for row in run.lanes if row.lane % LANE_KINDS in lanes)
        if lost:
            total += lost
            where.append(chunk.index)
            causes |= {cause for cause, n in chunk.ledger.lost.items() if n and cause not in UNNUMBERED_LOSSES}
        if any(chunk.ledger.lost.get(cause) for cause in UNNUMBERED_LOSSES):
            missed.append(chunk.index)
    found = []
    if total:
        of = "/".join(SENSES[kind].lanes)
        text = f"{total} events of {of} probes were lost ({', '.join(sorted(causes))}) in {_times(chunks, where)}"
        found.append(Doubt("lost", f"{text}; whose they were is not known", where))
    if missed:
        found.append(Doubt("probe_missed", f"the kernel skipped programs in {spans(missed)}", missed))
    return found


def _unclean(chunks: Sequence[Chunk]) -> list[Doubt]:
    ended = {run.run: chunk.index for chunk in chunks for run in chunk.ledger.runs if run.unclean}
    return [
        Doubt("unclean", f"run {run} ended uncleanly in chunk {index}: nobody knows how many events were lost", [index])
        for run, index in ended.items()
    ]


def _pauses(chunks: Sequence[Chunk], clock: Clock) -> list[Doubt]:
    """Return the times in which no collector ran: between two runs, and where no batch covers the time."""
    seen: set[str] = set()
    starts: list[tuple[int, str]] = []
    first_run = True
    silences: list[tuple[int, int, str, int]] = []
    ends: dict[str, int] = {}
    for chunk in chunks:
        for boot in chunk.ledger.window.boots:
            start, end = int(boot.start_ns), int(boot.end_ns)
            before = ends.get(boot.boot_id)
            if before is not None and start - before > _SILENCE_NS:
                silences.append((before, start, boot.boot_id, chunk.index))
            ends[boot.boot_id] = max(end, before or 0)
        for run in chunk.ledger.runs:
            if run.run not in seen:
                seen.add(run.run)
                if not first_run:
                    starts.append((chunk.index, clock.text(run.boot_id, int(run.since_ns)) if run.since_ns else ""))
                first_run = False
    found = []
    if starts:
        where = sorted({index for index, _ in starts})
        times = ", ".join(at or "at an unknown time" for _, at in starts[:_SHOWN_MAX]) + _more(len(starts))
        many = "once" if len(starts) == 1 else f"{len(starts)} times"
        text = f"the collector was started anew {many} ({times}): until then, from the end of the run before, "
        found.append(Doubt("restarted", text + "nothing was watched", where))
    if silences:
        told = ", ".join(
            f"{clock.text(boot, a)} to {clock.text(boot, b)}" for a, b, boot, _ in silences[:_SHOWN_MAX]
        ) + _more(len(silences))
        found.append(Doubt("silence", f"nothing covers {told}", [index for *_, index in silences]))
    return found


def _lines_elsewhere(report: ChainReport) -> list[Doubt]:
    where = [chunk.index for chunk in report.chunks if chunk.status == ARCHIVED]
    if not where:
        return []
    text = f"the lines of {spans(where)} were cleaned up: look into the archive that holds them"
    return [Doubt("archived", text, where)]


def unnamed_doubts(unnamed: dict[str, int], containers: Sequence[str], what: str) -> list[Doubt]:
    """Return the doubt about events whose image or container could not be named: any may be the subject's.

    `unnamed` counts them by reason, `containers` are those that are known of them.
    """
    if not unnamed:
        return []
    total = sum(unnamed.values())
    reasons = ", ".join(
        f"{n} {reason}" for reason, n in sorted(unnamed.items(), key=lambda item: -item[1])[:_SHOWN_MAX]
    )
    of = ""
    if containers:
        shown = [
            name.partition("://")[0] + "://" + name.partition("://")[2][:12] if "://" in name else name
            for name in containers[:_SHOWN_MAX]
        ]
        of = f"; of {', '.join(shown)}{_more(len(containers))}"
    return [Doubt("unnamed", f"{total} events are of a process whose {what} could not be named ({reasons}){of}")]


def _unsigned(report: ChainReport) -> list[Doubt]:
    where = [c.index for c in report.chunks if c.status in (UNSIGNED, INVALID, UNTRUSTED_KEY)]
    return [Doubt("unsigned", f"nothing vouches for {spans(where)} yet", where)] if where else []


def _more(count: int) -> str:
    return f", and {count - _SHOWN_MAX} more" if count > _SHOWN_MAX else ""


def _times(chunks: Sequence[Chunk], where: list[int]) -> str:
    """Return chunks and the time they were open in."""
    inside = [chunk.ledger.window for chunk in chunks if chunk.index in set(where)]
    return f"{spans(where)} ({inside[0].start[:19]}Z to {inside[-1].end[:19]}Z)"


def spans(numbers: Iterable[int]) -> str:
    """Return `chunk 3`, or `chunks 1 to 4, 7 and 9`, bounded in length."""
    ordered = sorted(set(numbers))
    ranges: list[tuple[int, int]] = []
    for number in ordered:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    told = [f"{a}" if a == b else f"{a} to {b}" for a, b in ranges[:12]]
    if len(ranges) > 12:
        told.append(f"{len(ranges) - 12} more ranges")
    text = " and ".join(filter(None, [", ".join(told[:-1]), told[-1]])) if told else "no chunk"
    return text if not told else f"{'chunk' if len(ordered) == 1 else 'chunks'} {text}"


def filtered_by_choice(chunks: Iterable[Chunk]) -> int:
    """Return how many events filters kept out, of whatever process."""
    return sum(
        n for chunk in chunks for cause, n in chunk.ledger.filtered.items() if cause != f"{KERNEL_FILTER_PREFIX}target"
    )
