"""Finds evidence lines in a directory of chunks and makes their proofs.

    place or line ──ledgers──▶ chunk ──one pass over its file──▶ line, leaf hashes, digest ──▶ proof

A chunk is read only after its ledger has said that it may hold the line, once for all lines asked of it.  A
proof is made only of a chunk whose bytes are what its statement says, under a signature that fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from stella_shared.errors import BadAnswer, NotFound, NotPermitted, TryAgain, UsageError
from stella_shared.evidence import canonical, dsse, keys, merkle, merkle_paths, names, proof, records, statement
from stella_shared.evidence.compressed import FrameReader
from stella_shared.evidence.directory import MAX_JSON_BYTES, read
from stella_shared.evidence.lines import MAX_LINE_BYTES
from stella_shared.evidence.proof import Proof
from stella_shared.evidence.records import Chain, Ledger
from stella_shared.evidence.statement import Statement
from stella_shared.evidence.transparency import bundle
from stella_shared.evidence.vouching import UNTRUSTED, Files, Trust, vouch
from stella_shared.wire import LANE_KINDS, UPROBE_KIND, LaneRow

_MAY_BE_OPEN: Final = "it may be in the open one, which is signed when it closes or when the node stops"
_DAMAGED: Final = "issue-evidence-chain-verification-failure"


class Place(NamedTuple):
    """What numbers an event: its run, lane and number there."""

    run: str
    lane: int
    seq: int

    def __str__(self) -> str:
        return f"{self.run}/{self.lane}/{self.seq}"


class LineOf(NamedTuple):
    """A line by its position: chunk, and line counted from 1."""

    chunk: int
    line: int


class Wanted(msgspec.Struct, frozen=True):
    """A line to prove.  With `text` it must be exactly that."""

    at: Place | LineOf
    text: bytes | None = None


class _Placed(msgspec.Struct, frozen=True, gc=False):
    """The members of a line that place it."""

    run: str
    lane: int
    seq: int


class _ShortRun(msgspec.Struct, frozen=True):
    run: str
    ended: bool
    lanes: list[LaneRow]


class _ShortLedger(msgspec.Struct, frozen=True):
    """What of a ledger says where an event is."""

    runs: list[_ShortRun]


class _Signed(msgspec.Struct, frozen=True):
    """A chunk's signed half, of which everything but the lines has been checked."""

    ledger: Ledger
    stated: Statement
    envelope: bytes
    public_key: bytes | None
    beside: Files


class _Scan(msgspec.Struct, frozen=True):
    """One pass over a chunk: its digest, its leaves' hashes back to back, and the lines found, by index."""

    sha256: str
    leaf_hashes: bytearray
    found: dict[Place | LineOf, tuple[int, bytes]]


def place_of(line: bytes) -> Place:
    """Return the place of an evidence line.  Raises `ValueError` when it has none."""
    try:
        placed = msgspec.json.decode(line, type=_Placed)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as e:
        raise ValueError(f"no evidence line: {e}") from None
    return Place(placed.run, placed.lane, placed.seq)


def _placed(decode: Callable[[bytes], _Placed], line: bytes) -> Place | None:
    """Return the place of a line, None for what has none: whatever it is, it is not what was asked for."""
    try:
        placed = decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return Place(placed.run, placed.lane, placed.seq)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode()


class Prover:
    """Makes proofs of the lines of one evidence directory.

    Raises `NotFound` when there is no evidence, and `UsageError` for an archive.
    """

    def __init__(self, evidence: Path) -> None:
        if not evidence.exists():
            raise NotFound(f"no evidence at {evidence}", hint="name an evidence directory with --evidence")
        if not evidence.is_dir():
            raise UsageError(f"{evidence} is no directory", hint="unpack an archive first")
        self._evidence = evidence
        self._kinds: dict[int, set[str]] = {}
        self._ledgers: dict[int, _ShortLedger] = {}
        with _translated():
            self._look()

    def _look(self) -> None:
        evidence = self._evidence
        try:
            self._chain = canonical.loads(self._read(names.CHAIN), Chain)
        except FileNotFoundError:
            raise NotFound(f"{evidence} holds no chain", hint="name an evidence directory with --evidence") from None
        except ValueError as e:
            raise _damaged(f"{evidence / names.CHAIN}: {e}") from None
        for entry in sorted(evidence.iterdir()):
            if file := names.parse_chunk_file(entry.name):
                self._kinds.setdefault(file.index, set()).add(file.kind)

    def prove(self, wanted: Sequence[Wanted]) -> list[Proof]:
        """Return a proof of each line, in order.

        Raises `NotFound` when there is no such line, `TryAgain` while it is in a chunk that is open or not
        signed, and `BadAnswer` when the evidence there is not what was signed or the line has another text.
        """
        with _translated():
            return self._prove(wanted)

    def _prove(self, wanted: Sequence[Wanted]) -> list[Proof]:
        made: dict[int, Proof] = {}
        waiting = {number: self._candidates(one.at) for number, one in enumerate(wanted)}
        while waiting:
            # Lines of the same chunk are proved in one pass; a line that is not there has its next candidate.
            by_chunk: dict[int, list[int]] = {}
            for number, chunks in waiting.items():
                by_chunk.setdefault(self._next(wanted[number].at, chunks), []).append(number)
            for chunk, numbers in sorted(by_chunk.items()):
                for number, one in zip(numbers, self._in_chunk(chunk, [wanted[n] for n in numbers]), strict=True):
                    if one is not None:
                        made[number] = one
                        del waiting[number]
        return [made[number] for number in range(len(wanted))]

    # -- which chunk -----------------------------------------------------------------------------------

    def _candidates(self, at: Place | LineOf) -> Iterator[int]:
        """Yield the chunks that may hold a line, the likeliest first."""
        return iter([at.chunk]) if isinstance(at, LineOf) else iter(self._chunks_of(at))

    def _next(self, at: Place | LineOf, chunks: Iterator[int]) -> int:
        chunk = next(chunks, None)
        if chunk is None:
            if isinstance(at, Place) and at.lane % LANE_KINDS == UPROBE_KIND and self._has_open():
                raise _not_yet(f"{at} is in no closed chunk", _MAY_BE_OPEN)
            raise NotFound(
                f"no line {at} is in the evidence: its number was filtered or lost",
                hint="stella signals verify-chain shows how many were, and by which cause",
            )
        files = self._kinds.get(chunk, set())
        if not files:
            raise NotFound(f"{self._evidence} holds no chunk {chunk}")
        if names.OPEN_DATA in files or names.DATA not in files:
            raise _not_yet(f"chunk {chunk} is still open", "it is signed when it closes, or when the node stops")
        if names.ENVELOPE not in files:
            raise _not_yet(f"chunk {chunk} is closed, but not signed yet", "the signer signs it next")
        return chunk

    def _chunks_of(self, at: Place) -> list[int]:
        """Return the chunks whose ledgers can account for a number, the likeliest first."""
        near: list[tuple[int, int]] = []
        end, live = 0, False
        closed = [index for index in sorted(self._kinds) if names.LEDGER in self._kinds[index]]
        for index in closed:
            for run in self._short_ledger(index).runs:
                if run.run != at.run:
                    continue
                live = not run.ended
                for row in run.lanes:
                    if row.lane != at.lane:
                        continue
                    end = max(end, row.next)
                    distance = max(row.first - at.seq, at.seq - row.next + 1, 0)
                    # Numbers of the uprobe lane settle by count: one may be a chunk earlier or later.
                    if row.recorded and (distance == 0 or at.lane % LANE_KINDS == UPROBE_KIND):
                        near.append((distance, index))
        if at.seq >= end and not near:
            if self._has_open() and (live or not end):
                raise _not_yet(f"{at} is in no closed chunk", _MAY_BE_OPEN)
            raise NotFound(f"no chunk of {self._evidence} accounts for {at}", hint="an event is named RUN/LANE/SEQ")
        return [index for _, index in sorted(near)]

    def _has_open(self) -> bool:
        return any(names.OPEN_DATA in files for files in self._kinds.values())

    def _short_ledger(self, index: int) -> _ShortLedger:
        if index not in self._ledgers:
            name = names.chunk_file(index, names.LEDGER)
            try:
                self._ledgers[index] = msgspec.json.decode(self._read(name), type=_ShortLedger)
            except (msgspec.MsgspecError, RecursionError, ValueError) as e:
                raise _damaged(f"{name}: {e}") from None
        return self._ledgers[index]

    # -- one chunk -------------------------------------------------------------------------------------

    def _in_chunk(self, index: int, wanted: list[Wanted]) -> list[Proof | None]:
        """Return the proofs of lines in a signed chunk, None for each that is not there."""
        signed = self._signed(index)
        count = signed.ledger.lines
        for one in wanted:
            if isinstance(one.at, LineOf) and not 1 <= one.at.line <= count:
                raise NotFound(f"chunk {index} has {count} lines, so no line {one.at.line}")
        name = names.chunk_file(index, names.DATA)
        scan = self._scan(index, {one.at for one in wanted})
        if scan.sha256 != signed.stated.subject[0].digest.get("sha256"):
            raise _damaged(f"{name} is not what was signed")
        there = [scan.found[one.at] for one in wanted if one.at in scan.found]
        paths, root = merkle_paths.inclusion_paths(scan.leaf_hashes, [leaf for leaf, _ in there])
        if root.hex() != signed.stated.predicate.events.merkle_root:
            raise _damaged(f"{name} has another Merkle root than was signed")
        path_of = {leaf: path for (leaf, _), path in zip(there, paths, strict=True)}
        made: list[Proof | None] = []
        for one in wanted:
            leaf, line = scan.found.get(one.at, (-1, b""))
            if leaf < 0:
                made.append(None)
                continue
            if one.text is not None and one.text != line:
                raise BadAnswer(
                    f"line {leaf + 1} of chunk {index} is {one.at}, but it has another text",
                    hint="the line that was given is not the one that was signed",
                )
            made.append(self._proof(index, signed, leaf, line, path_of[leaf]))
        return made

    def _proof(self, index: int, signed: _Signed, leaf: int, line: bytes, path: list[bytes]) -> Proof:
        try:
            text = line.decode()
        except UnicodeError:
            raise _damaged(f"line {leaf + 1} of chunk {index} is no UTF-8") from None
        return Proof(
            proof.FORMAT,
            self._chain.chain_id,
            index,
            text,
            leaf,
            signed.ledger.lines,
            [one.hex() for one in path],
            signed.envelope.decode(),
            _text(signed.public_key),
            _text(signed.beside.certificate),
            _text(signed.beside.stamps),
            _text(signed.beside.bundle),
        )

    def _signed(self, index: int) -> _Signed:
        """Return what vouches for a chunk, after holding it against itself and the chain."""
        envelope_name = names.chunk_file(index, names.ENVELOPE)
        try:
            envelope = self._read(envelope_name, dsse.MAX_ENVELOPE_BYTES)
            opened = dsse.open_envelope(envelope)
            stated = statement.decode(opened.payload)
            beside = Files(*(self._beside(index, kind) for kind in (names.CERTIFICATE, names.STAMPS, names.BUNDLE)))
            public_key = None if beside.certificate else self._public_key(opened.key_id)
            candidates = {} if public_key is None else {opened.key_id: keys.load_public(public_key)}
        except FileNotFoundError as e:
            raise _damaged(f"{e.filename} is missing") from None
        except ValueError as e:
            raise _damaged(f"{envelope_name}, or what lies beside it: {e}") from None
        if public_key is not None and keys.key_id(candidates[opened.key_id]) != opened.key_id:
            raise _damaged(f"the file of key {opened.key_id} holds another key")
        # Whom to trust is for whoever checks the proof; what does not fit proves nothing to anybody.
        for objection in vouch(envelope, beside, candidates, Trust()).objections:
            if objection.code not in UNTRUSTED:
                raise _damaged(f"{envelope_name}: {objection.message}")
        link = stated.predicate.chain
        if (link.id, link.index) != (self._chain.chain_id, index):
            raise _damaged(f"{envelope_name} is of chunk {link.index} of chain {link.id}")
        ledger_name = names.chunk_file(index, names.LEDGER)
        try:
            data = self._read(ledger_name)
            ledger = canonical.loads(data, Ledger)
        except FileNotFoundError:
            raise _damaged(f"{ledger_name} is missing") from None
        except ValueError as e:
            raise _damaged(f"{ledger_name}: {e}") from None
        events = stated.predicate.events
        same = (ledger.format, ledger.lines, ledger.sha256) == (
            records.FORMAT,
            events.count,
            stated.subject[0].digest.get("sha256"),
        )
        if not same or sha256(data).hexdigest() != stated.predicate.accounting.ledger_sha256:
            raise _damaged(f"{ledger_name} is not what was signed")
        return _Signed(ledger, stated, envelope, public_key, beside)

    def _beside(self, index: int, kind: str) -> bytes | None:
        return self._read(names.chunk_file(index, kind), bundle.MAX_BYTES) if kind in self._kinds[index] else None

    def _public_key(self, key_id: str) -> bytes:
        name = f"{key_id}.pem"
        if names.parse_key_file(name) is None:
            raise ValueError(f"{key_id[:64]!r} is no key id")
        return self._read(f"{names.KEYS}/{name}")

    def _scan(self, index: int, wanted: set[Place | LineOf]) -> _Scan:
        hashes, rest = bytearray(), b""
        found: dict[Place | LineOf, tuple[int, bytes]] = {}
        by_place = any(isinstance(at, Place) for at in wanted)
        decode = msgspec.json.Decoder(_Placed).decode
        name = names.chunk_file(index, names.DATA)
        with (self._evidence / name).open("rb", buffering=0) as file:
            reader = FrameReader(file)
            try:
                for block in reader.frames():
                    lines = (rest + block).split(b"\n")
                    rest = lines.pop()
                    if len(rest) > MAX_LINE_BYTES:
                        raise _damaged(f"chunk {index} has a line of more than {MAX_LINE_BYTES} bytes")
                    first = len(hashes) // merkle_paths.HASH_BYTES
                    hashes += b"".join(merkle.leaves(lines))
                    for leaf, line in enumerate(lines, first):
                        if (at := LineOf(index, leaf + 1)) in wanted:
                            found[at] = leaf, line
                        if by_place and (here := _placed(decode, line)) in wanted:
                            found.setdefault(here, (leaf, line))
            except ValueError as e:
                raise _damaged(f"{name}: {e}") from None
        return _Scan(reader.sha256.hexdigest(), hashes, found)

    def _read(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        return read(self._evidence / name, limit)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Tell of what the file system refuses in our own words."""
    try:
        yield
    except PermissionError as e:
        raise NotPermitted(
            f"{e.filename}: {e.strerror}", hint="run as the owner of the evidence, or as root", runbook=_DAMAGED
        ) from None
    except OSError as e:
        raise BadAnswer(f"{e.filename} cannot be read: {e.strerror}", hint="check the disk") from None


def _damaged(message: str) -> BadAnswer:
    return BadAnswer(message, hint="stella signals verify-chain says what else is wrong there", runbook=_DAMAGED)


def _not_yet(message: str, hint: str) -> TryAgain:
    return TryAgain(f"{message}: nothing vouches for it yet", hint=hint, runbook="procedure-prove-one-event")
