"""Verifies a chain of evidence: no network, no private key, nothing but files.

    verify_chain(path) → read head and trust → list → chunk by chunk: signature, statement, ledger, bytes,
    links, identity, lanes, lines → the end against the head → ChainReport

Every disagreement becomes a `Fault` with its own code; the walk goes on after one, so that a report names
them all.  The evidence may be written to meanwhile: the head is read first, then the directory is listed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from stella_shared.errors import BadAnswer, ConfigError, NotFound, NotPermitted, UsageError
from stella_shared.evidence import (
    archive,
    canonical,
    dsse,
    extent,
    keys,
    manifest,
    names,
    notes,
    pins,
    records,
    report,
    reset,
    statement,
)
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.disk import TMP_SUFFIX
from stella_shared.evidence.lines import Digest, LineChecker
from stella_shared.evidence.pins import Pin
from stella_shared.evidence.records import Accounting, Chain, Head, Ledger, Standing
from stella_shared.evidence.report import (
    Archived,
    ChainReport,
    ChunkNote,
    ChunkReport,
    Fault,
    HeadCheck,
    OpenChunk,
    Warning,
)
from stella_shared.evidence.statement import Statement
from stella_shared.evidence.store import SIGNER_LOCK, TRUST, TRUSTED_ROOT
from stella_shared.evidence.transparency import bundle, certificate
from stella_shared.evidence.transparency.certificate import Identity
from stella_shared.evidence.transparency.trust import parse as parse_root
from stella_shared.evidence.vouching import Files, Trust, Vouched, clock_ahead, earliest, form_code, vouch

MAX_JSON_BYTES: Final = 64 << 20
_IGNORED_DIRECTORIES: Final = frozenset({"lost+found"})
_LISTING_TRIES: Final = 5
_WALK_TRIES: Final = 3

Progress = Callable[[int, int], None]


def verify_chain(
    path: Path,
    *,
    trusted_keys: set[str] | None = None,
    head: Path | None = None,
    progress: Progress | None = None,
    trust: Trust | None = None,
    own: bool = False,
    require_log: bool = False,
) -> ChainReport:
    """Return the answer about the evidence in `path`: a directory, or a .tar, .tar.gz or .tgz of one.

    A signed manifest in it declares which part of a chain it is meant to be.  `head` is a pinned end (`pins`).
    A node's `own` evidence is whole: there a manifest would only hide a cut, so it is a fault.  The directory
    beside which `state` belongs to a signer is taken for such.

    `trust` says who is believed: keys, identities of keyless signers, a trusted root for logs and authorities;
    `trusted_keys`, key ids in hex (`sha256:` may stand before), is the short form.  Without either, and without
    `head`, the directory `state` beside the evidence is asked; an archive is never asked about its own trust.
    With `require_log` a signed chunk for which no trusted log entry vouches is a fault.
    `progress(done, total)` is called with bytes as chunks are read.  Raises `NotFound` when there is nothing
    at `path`, `NotPermitted` when it may not be read, and `BadAnswer` for an archive that cannot be taken apart.
    """
    if trust is None and trusted_keys is not None:
        trust = Trust({key.removeprefix("sha256:").lower(): "" for key in trusted_keys})
    if not path.exists():
        raise NotFound(f"no evidence at {path}", hint="name an evidence directory, or a .tar.gz of one")
    try:
        if path.is_dir():
            for left in reversed(range(_WALK_TRIES)):
                try:
                    walk = _Walk(
                        path,
                        path,
                        trust=trust,
                        head=head,
                        strange=[],
                        progress=progress,
                        own=own,
                        require_log=require_log,
                    )
                    return walk.run()
                except FileNotFoundError:
                    # A cleanup took a file that was listed a moment before: what is there now is asked.
                    if not left:
                        raise
        if not path.name.endswith(archive.SUFFIXES):
            raise UsageError(f"{path} is neither a directory nor one of {', '.join(archive.SUFFIXES)}")
        with archive.unpacked(path) as inside:
            walk = _Walk(
                path,
                inside.directory,
                trust=trust,
                head=head,
                strange=inside.strange,
                progress=progress,
                require_log=require_log,
            )
            return walk.run()
    except PermissionError as e:
        raise NotPermitted(
            f"{e.filename or path}: {e.strerror}", hint="run as the owner of the evidence, or as root"
        ) from None
    except OSError as e:
        raise BadAnswer(f"{e.filename or path} cannot be read: {e.strerror}", hint="check the disk") from None


class _Known(msgspec.Struct, frozen=True):
    """What the walk remembers of the chunk before."""

    index: int
    ledger: Ledger | None = None
    ledger_sha256: str = ""
    chunk_sha256: str = ""
    statement_sha256: str = ""


class _Walk:
    """One verification, from the first file to the report."""

    def __init__(
        self,
        shown: Path,
        directory: Path,
        *,
        trust: Trust | None,
        head: Path | None,
        strange: list[str],
        progress: Progress | None,
        own: bool = False,
        require_log: bool = False,
    ) -> None:
        self._shown = shown
        self._directory = directory
        self._faults: list[Fault] = []
        self._warnings: list[Warning] = []
        self._progress = progress or (lambda done, total: None)
        state = shown.parent / "state" if shown == directory else None
        self._trust = trust if trust is not None else self._own_trust(state)
        self._head_path = head or (state / "head.json" if state else None)
        self._head_required = head is not None
        self._require_log = require_log
        self._own = own or (
            state is not None and any((state / name).exists() for name in (f"keys/{keys.SIGNING_KEY}", SIGNER_LOCK))
        )
        self._declared: list[manifest.Manifest] = []
        self._first = names.FIRST_INDEX
        self._strange = strange
        self._keys: dict[str, ec.EllipticCurvePublicKey] = {}
        self._chain: Chain | None = None
        self._manifest_sha256 = ""
        self._chunks: list[ChunkReport] = []
        self._before: _Known | None = None
        self._standing: Standing | None = records.standing_after([], [])
        self._at_head: Head | None = None
        self._statements: dict[int, str] = {}
        self._last_signed = 0
        self._unjudged = 0
        self._lost: dict[str, int] = {}
        self._filtered: dict[str, int] = {}
        self._bytes_done = self._bytes_total = 0
        self._bare: set[int] = set()
        self._notes: list[ChunkNote] = []

    def _fault(self, code: str, chunk: int | None, message: str, hint: str = "") -> None:
        self._faults.append(Fault(code, chunk, message, hint))

    def _warn(self, code: str, chunk: int | None, message: str) -> None:
        self._warnings.append(Warning(code, chunk, message))

    # -- what is trusted, and what is known of the end -------------------------------------------------

    def _own_trust(self, state: Path | None) -> Trust:
        """Return whom the state directory beside the evidence trusts."""
        if state is None:
            return Trust()
        try:
            return node_trust(state)
        except (NotPermitted, ConfigError) as e:
            self._warn("no_trust", None, str(e))
            return Trust()

    def _read_head(self) -> Pin | None:
        if self._head_path is None:
            return None
        try:
            data = _read(self._head_path)
        except (FileNotFoundError, NotADirectoryError):
            if self._head_required:
                raise NotFound(f"no head at {self._head_path}") from None
            return None
        except PermissionError as e:
            if self._head_required:
                raise
            self._warn("no_head", None, f"{self._head_path}: {e.strerror}")
            return None
        except ValueError as e:
            self._fault("malformed", None, f"{self._head_path}: {e}")
            return None
        try:
            return pins.read(data)
        except ValueError as e:
            self._fault(form_code(e), None, f"{self._head_path}: {e}")
            return None

    # -- the directory ---------------------------------------------------------------------------------

    def run(self) -> ChainReport:
        """Walk the whole chain."""
        head = self._read_head()
        listing = self._listing()
        self._read_manifest()
        self._read_keys(listing)
        for name in self._strange:
            self._fault("inserted", None, f"{name} is no file of an evidence directory")
        kinds = self._chunk_files(listing)
        opened = self._open_chunk(kinds)
        self._read_declared(listing)
        with ChunkReader() as self._reader:
            self._walk(kinds, head)
        self._settle_bare()
        self._check_declared()
        self._check_end(head)
        return self._report(opened, head)

    def _listing(self) -> dict[str, str]:
        """Return the names with their kind: `file`, `directory`, or `other` (links too).

        A rename under way may hide a file from a single look, so look until two agree.
        """
        seen = _look(self._directory)
        for _ in range(_LISTING_TRIES):
            again = _look(self._directory)
            if again == seen:
                break
            seen = again
        return seen

    def _read_manifest(self) -> None:
        try:
            data = _read(self._directory / names.CHAIN)
            self._manifest_sha256 = sha256(data).hexdigest()
            chain = canonical.loads(data, Chain)
            if chain.format != records.FORMAT:
                raise ValueError(f"format {chain.format} is not known here")
            self._chain = chain
        except FileNotFoundError:
            self._fault("missing", None, f"{names.CHAIN} is missing")
        except ValueError as e:
            self._fault(form_code(e), None, f"{names.CHAIN}: {e}")

    def _read_keys(self, listing: dict[str, str]) -> None:
        directory = self._directory / names.KEYS
        if listing.get(names.KEYS) != "directory":
            self._fault("missing", None, f"the directory {names.KEYS} is missing")
            return
        for name, kind in _look(directory).items():
            shown = f"{names.KEYS}/{name}"
            identity = names.parse_key_file(name)
            if identity is None or kind != "file":
                if not self._left_over(name, names.parse_key_file(name.removesuffix(TMP_SUFFIX)), shown):
                    self._fault("inserted", None, f"{shown} is no public key's name")
                continue
            try:
                key = keys.load_public(_read(directory / name))
            except ValueError as e:
                self._fault(form_code(e), None, f"{shown}: {e}")
                continue
            if keys.key_id(key) != identity:
                self._fault("edited", None, f"{shown} holds another key")
                continue
            self._keys[identity] = key

    def _left_over(self, name: str, meant: object, shown: str) -> bool:
        """Return whether `name` is the temporary form of a file we know: a crash leaves such, and nobody reads it."""
        if not name.endswith(TMP_SUFFIX) or meant is None:
            return False
        self._warn("left_over", None, f"{shown} was being written when something died; it means nothing")
        return True

    def _chunk_files(self, listing: dict[str, str]) -> dict[int, set[str]]:
        kinds: dict[int, set[str]] = {}
        for name, kind in listing.items():
            file = names.parse_chunk_file(name)
            if file is not None and kind == "file":
                kinds.setdefault(file.index, set()).add(file.kind)
            elif names.is_manifest(name) and kind == "file" and not self._own:
                pass
            elif name not in (names.CHAIN, names.KEYS) and not (kind == "directory" and name in _IGNORED_DIRECTORIES):
                base = name.removesuffix(TMP_SUFFIX)
                if not self._left_over(name, names.parse_chunk_file(base) or (base == names.CHAIN or None), name):
                    self._fault("inserted", None, f"{name} is no file of an evidence directory")
        return kinds

    def _open_chunk(self, kinds: dict[int, set[str]]) -> OpenChunk | None:
        """Take the open chunk out of `kinds`, and refuse open files that stand anywhere but at the end."""
        opened: OpenChunk | None = None
        last = max(kinds, default=0)
        for index in sorted(kinds):
            files = kinds[index]
            if names.OPEN_DATA in files and index == last and not files & {names.DATA, names.ENVELOPE}:
                # Its ledger may be there already, when the signer is just closing it, or died doing so.
                files.clear()
                with contextlib.suppress(FileNotFoundError):  # closed since the listing
                    size = (self._directory / names.chunk_file(index, names.OPEN_DATA)).stat().st_size
                    opened = OpenChunk(index, size)
            elif names.OPEN_DATA in files:
                self._fault("inserted", index, f"{names.chunk_file(index, names.OPEN_DATA)} is not at the end")
            elif names.OPEN_JOURNAL in files and index != last:
                self._fault("inserted", index, f"{names.chunk_file(index, names.OPEN_JOURNAL)} is not at the end")
            files -= {names.OPEN_DATA, names.OPEN_JOURNAL}
            if not files:
                del kinds[index]
        return opened

    # -- the chunks ------------------------------------------------------------------------------------

    def _walk(self, kinds: dict[int, set[str]], head: Pin | None) -> None:
        last_enveloped = max((i for i, files in kinds.items() if names.ENVELOPE in files), default=0)
        expected = self._first = extent.first_chunk(self._declared, kinds)
        if expected != names.FIRST_INDEX:
            self._take_anchor(expected - 1, kinds.pop(expected - 1, set()))
        self._bytes_total = self._data_bytes(kinds)
        self._progress(0, self._bytes_total)
        for index in sorted(kinds):
            if index != expected:
                span = f"chunk {expected} is" if index == expected + 1 else f"chunks {expected} to {index - 1} are"
                self._fault("missing", expected, f"{span} missing")
                self._before = self._standing = None
            self._chunk(index, kinds[index], unsigned_tail=index > last_enveloped, head=head)
            expected = index + 1

    def _data_bytes(self, kinds: dict[int, set[str]]) -> int:
        total = 0
        for index in kinds:
            with contextlib.suppress(FileNotFoundError):
                total += (self._directory / names.chunk_file(index, names.DATA)).stat().st_size
        return total

    def _count(self, size: int) -> None:
        self._bytes_done += size
        self._progress(self._bytes_done, self._bytes_total)

    def _chunk(self, index: int, files: set[str], *, unsigned_tail: bool, head: Pin | None) -> None:
        faults_before = len(self._faults)
        needed = {names.DATA, names.LEDGER} | (set() if unsigned_tail else {names.ENVELOPE})
        if {names.LEDGER, names.ENVELOPE} <= files and names.DATA not in files:
            needed.discard(names.DATA)
            self._bare.add(index)
        for kind in sorted(needed - files):
            self._fault("missing", index, f"{names.chunk_file(index, kind)} is missing")
        signed = names.ENVELOPE in files
        stated, statement_sha256, vouched = self._envelope(index, files) if signed else (None, "", Vouched())
        ledger_bytes = self._ledger_bytes(index) if names.LEDGER in files else None
        ledger, ledger_sha256, form = self._ledger(ledger_bytes)
        checker = LineChecker(ledger, self._chain.node) if ledger and self._chain else None
        digest = self._digest(index, checker) if names.DATA in files else None
        self._compare(index, stated=stated, ledger=ledger, ledger_sha256=ledger_sha256, form=form, digest=digest)
        if stated is not None:
            self._links(index, stated)
        if ledger is not None:
            data_is_signed = digest is not None and digest.sha256 == ledger.sha256
            self._identity(index, ledger, checker if data_is_signed else None)
            for message in notes.form_faults(ledger):
                self._fault("malformed", index, message)
            self._notes += [ChunkNote(index, note) for note in ledger.notes]
        if unsigned_tail:
            self._warn("unsigned", index, "closed, and not signed yet: nothing vouches for it")
        status = _status({fault.code for fault in self._faults[faults_before:]}, vouched, signed=not unsigned_tail)
        self._chunks.append(_chunk_report(index, status, ledger, vouched, statement_sha256))
        if stated is not None:
            self._last_signed = index
            self._statements[index] = statement_sha256
            if head is not None and ledger is not None and head.index == index:
                self._at_head = records.head_of(ledger, statement_sha256, vouched.key_id)
        self._stand(index, ledger, ledger_sha256, stated, statement_sha256)

    def _stand(
        self, index: int, ledger: Ledger | None, ledger_sha256: str, stated: Statement | None, statement_sha256: str
    ) -> None:
        """Remember a chunk as the one before the next."""
        chunk_sha256 = stated.subject[0].digest.get("sha256", "") if stated else ""
        self._before = _Known(index, ledger, ledger_sha256, chunk_sha256, statement_sha256)
        self._standing = records.standing_after(ledger.runs, ledger.ended_runs) if ledger else None

    def _settle_bare(self) -> None:
        """Say of chunks whose lines are not here whether a signed note of a later chunk accounts for that."""
        sound = {c.index for c in self._chunks if c.status not in (report.INVALID, report.UNSIGNED)}
        archived = notes.covered(self._bare, [(told.chunk, told.note) for told in self._notes if told.chunk in sound])
        archived |= self._bare & {index for declared in self._declared for index in declared.predicate.archived}
        for index in sorted(self._bare - archived):
            name = names.chunk_file(index, names.DATA)
            self._fault("missing", index, f"{name} is missing, and no signed note says that it was cleaned up")
        for place, chunk in enumerate(self._chunks):
            if chunk.index in self._bare - archived:
                self._chunks[place] = msgspec.structs.replace(chunk, status=report.INVALID)
            elif chunk.index in archived and chunk.status not in (report.INVALID, report.UNTRUSTED_KEY):
                self._chunks[place] = msgspec.structs.replace(chunk, status=report.ARCHIVED)

    def _envelope(self, index: int, files: set[str]) -> tuple[Statement | None, str, Vouched]:
        """Return (statement, its SHA-256, who vouches for it) of a chunk; faults say what does not hold."""

        def read(kind: str, limit: int) -> bytes | None:
            return _read(self._directory / names.chunk_file(index, kind), limit) if kind in files else None

        name = names.chunk_file(index, names.ENVELOPE)
        try:
            envelope = read(names.ENVELOPE, dsse.MAX_ENVELOPE_BYTES) or b""
            beside = Files(
                read(names.CERTIFICATE, certificate.MAX_BYTES),
                read(names.STAMPS, bundle.MAX_BYTES),
                read(names.BUNDLE, bundle.MAX_BYTES),
            )
        except ValueError as e:
            self._fault("malformed", index, f"{name} or what lies beside it: {e}")
            return None, "", Vouched()
        stated: Statement | None = None
        form = ""
        try:
            stated = statement.decode(dsse.open_envelope(envelope).payload)
        except ValueError as e:
            form = str(e)
        vouched = vouch(envelope, beside, self._keys, self._trust, stated.predicate.window.end if stated else "")
        for objection in vouched.objections:
            self._fault(objection.code, index, objection.message, objection.hint)
        if stated is None and vouched.payload is not None:
            self._fault(form_code(form), index, f"statement: {form}")
        self._unjudged += vouched.unjudged
        for text in vouched.unknown_times:
            self._warn("unknown_time", index, text)
        if stated and vouched.times and clock_ahead(stated.predicate.window.end, vouched.times):
            self._warn(
                "clock_ahead", index, f"it ends after it was seen ({earliest(vouched.times)}): a wrong clock, or a lie"
            )
        if vouched.logged and not vouched.times:
            self._warn("untrusted_time", index, "in the log, but nobody who is trusted says when: only the local clock")
        return stated, sha256(vouched.payload).hexdigest() if vouched.payload else "", vouched

    def _ledger_bytes(self, index: int) -> bytes | None:
        try:
            return _read(self._directory / names.chunk_file(index, names.LEDGER))
        except ValueError as e:
            self._fault("malformed", index, f"ledger: {e}")
            return None

    def _ledger(self, data: bytes | None) -> tuple[Ledger | None, str, str]:
        """Return (ledger, SHA-256 of its file, what is wrong with its form)."""
        if data is None:
            return None, "", ""
        digest = sha256(data).hexdigest()
        try:
            return canonical.loads(data, Ledger), digest, ""
        except ValueError as e:
            return None, digest, str(e)

    def _digest(self, index: int, checker: LineChecker | None) -> Digest | None:
        try:
            return self._reader.read(self._directory / names.chunk_file(index, names.DATA), checker, self._count)
        except ValueError as e:
            self._fault("malformed", index, str(e))
            return None

    def _compare(
        self,
        index: int,
        *,
        stated: Statement | None,
        ledger: Ledger | None,
        ledger_sha256: str,
        form: str,
        digest: Digest | None,
    ) -> None:
        """Hold statement, ledger and bytes of one chunk against each other."""
        data_name = names.chunk_file(index, names.DATA)
        ledger_name = names.chunk_file(index, names.LEDGER)
        said = stated.subject[0].digest.get("sha256", "") if stated else ledger.sha256 if ledger else ""
        ledger_fits = not stated or not ledger_sha256 or ledger_sha256 == stated.predicate.accounting.ledger_sha256
        data_fits = digest is None or not said or digest.sha256 == said
        if not ledger_fits and not data_fits and ledger and digest and ledger.sha256 == digest.sha256:
            self._fault("bundle_mismatch", index, "the statement describes another chunk than the one that is here")
            return
        if not ledger_fits:
            self._fault("edited", index, f"{ledger_name} is not what was signed")
        elif form:
            self._fault(form_code(form), index, f"{ledger_name}: {form}")
        if not data_fits:
            self._fault("edited", index, f"{data_name} is not what was signed")
        if ledger is None or not ledger_fits:
            return
        if self._chain and (ledger.chain_id != self._chain.chain_id or ledger.format != records.FORMAT):
            self._fault("spliced", index, f"{ledger_name} is of chain {ledger.chain_id}")
        if ledger.index != index:
            self._fault("reordered", index, f"{ledger_name} says that it is chunk {ledger.index}")
        if digest and data_fits and _shape(digest) != (ledger.bytes, ledger.lines, ledger.merkle_root, ledger.sha256):
            self._fault("bundle_mismatch", index, f"{ledger_name} does not describe {data_name}")
        if digest and data_fits and not digest.complete:
            self._fault("malformed", index, f"{data_name} does not end with a newline")
        if stated and stated != statement.build(ledger, ledger_sha256, _context(stated)):
            self._fault("bundle_mismatch", index, "statement and ledger do not describe the same thing")
        before = self._before
        if before and before.ledger_sha256 and ledger.previous_ledger_sha256 != before.ledger_sha256:
            self._fault("forked", index, "its ledger continues another ledger than the one before it")
        if index == names.FIRST_INDEX and ledger.previous_ledger_sha256:
            self._fault("forked", index, "the first ledger names one before it")

    def _links(self, index: int, stated: Statement) -> None:
        link, chain = stated.predicate.chain, self._chain
        if chain and (link.id != chain.chain_id or stated.predicate.host.node != chain.node):
            self._fault("spliced", index, f"its statement is of chain {link.id}, node {stated.predicate.host.node}")
            return
        if link.index != index:
            self._fault("reordered", index, f"its statement says that it is chunk {link.index}")
            return
        if stated.subject[0].name != names.chunk_file(index, names.DATA):
            self._fault("bundle_mismatch", index, f"its statement is about {stated.subject[0].name}")
        if chain and (link.manifest_sha256 != self._manifest_sha256 or link.predecessor != chain.predecessor):
            self._fault("edited", index, f"{names.CHAIN} is not the one that was signed")
        if (link.previous is None) != (index == names.FIRST_INDEX):
            self._fault("forked", index, "only the first chunk has none before it")
        before = self._before
        if link.previous is None or before is None or not before.statement_sha256:
            return
        here = (before.index, before.chunk_sha256, before.statement_sha256)
        if (link.previous.index, link.previous.chunk_sha256, link.previous.statement_sha256) != here:
            self._fault("forked", index, f"it follows another chunk {link.previous.index} than the one that is here")

    def _identity(self, index: int, ledger: Ledger, checker: LineChecker | None) -> None:
        for message in records.identity_faults(ledger):
            self._fault("identity_broken", index, message)
        if self._standing is not None:
            pick_up = index == names.FIRST_INDEX and bool(self._chain and self._chain.predecessor)
            for message in records.continuity_faults(self._standing, ledger, may_pick_up=pick_up):
                self._fault("identity_broken", index, message)
        for fault in checker.finish() if checker else []:
            self._fault(fault.code, index, fault.message)
        for cause, n in ledger.lost.items():
            self._lost[cause] = self._lost.get(cause, 0) + n
        for cause, n in ledger.filtered.items():
            self._filtered[cause] = self._filtered.get(cause, 0) + n
        for run in ledger.runs:
            if run.unclean:
                self._warn(
                    "unclean", index, f"run {run.run} ended uncleanly: {run.unclean}; nobody knows how many were lost"
                )
            if run.missing:
                spans = ", ".join(f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in run.missing[:5])
                self._warn("missing_batches", index, f"run {run.run}: batches {spans} never came; counted as lost")

    # -- the end ---------------------------------------------------------------------------------------

    def _take_anchor(self, index: int, files: set[str]) -> None:
        """Stand after the chunk before the first one: its statement and ledger are here, its lines are not."""
        for kind in sorted({names.LEDGER, names.ENVELOPE} - files):
            self._fault("missing", index, f"{names.chunk_file(index, kind)} is missing: the export is anchored there")
        signed = names.ENVELOPE in files
        stated, statement_sha256, _ = self._envelope(index, files) if signed else (None, "", Vouched())
        ledger_bytes = self._ledger_bytes(index) if names.LEDGER in files else None
        ledger, ledger_sha256, form = self._ledger(ledger_bytes)
        self._compare(index, stated=stated, ledger=ledger, ledger_sha256=ledger_sha256, form=form, digest=None)
        if stated is not None:
            self._links(index, stated)
            self._statements[index] = statement_sha256
        self._stand(index, ledger, ledger_sha256, stated, statement_sha256)

    def _read_declared(self, listing: dict[str, str]) -> None:
        """Read the manifests: they say which part of the chain this is.  Each must be signed by a trusted key."""
        for name in [n for n, kind in listing.items() if kind == "file" and names.is_manifest(n) and not self._own]:
            try:
                found, opened = manifest.open_signed(_read(self._directory / name, manifest.MAX_ENVELOPE_BYTES))
            except ValueError as e:
                self._fault(form_code(e), None, f"{name}: {e}")
                continue
            told, chain = found.predicate, self._chain
            if chain is not None and (told.chain_id, told.node) != (chain.chain_id, chain.node):
                self._fault("spliced", None, f"{name} is of chain {told.chain_id}")
                continue
            if not self._signed_by_trusted(opened, name):
                # The fault stands; the range is taken all the same, so that not every chunk is called missing.
                found = msgspec.structs.replace(found, predicate=msgspec.structs.replace(told, archived=[]))
            self._declared.append(found)

    def _signed_by_trusted(self, opened: dsse.Opened, shown: str) -> bool:
        """Return whether a trusted key has signed this; a fault says why not.

        Where no key is trusted at all the keys that lie here are taken, so that all else can be looked at: the
        chain is not valid then anyway.
        """
        named = [opened.key_id] if opened.key_id else sorted(self._trust.keys)
        known = [key for key in named if not self._trust.anybody or key in self._trust.keys]
        message = dsse.pae(dsse.PAYLOAD_TYPE, opened.payload)
        if not known:
            self._fault("unknown_key", None, f"{shown} is signed with key sha256:{opened.key_id[:64]}, not trusted")
        elif any(keys.signature_holds(self._keys[k], message, opened.signature) for k in known if k in self._keys):
            return True
        else:
            self._fault("bad_signature", None, f"{shown}: no key in {names.KEYS}/ has made its signature")
        return False

    def _check_declared(self) -> None:
        """Hold what the manifests say against what is here."""
        for declared in self._declared:
            for fault in extent.faults(declared, self._directory, self._statements, self._last_signed, self._chunks):
                self._fault(fault.code, fault.chunk, fault.message)

    def _check_end(self, head: Pin | None) -> None:
        if not self._last_signed:
            self._fault("unsigned", None, "nothing here is signed", hint="a node signs its first chunk when it starts")
        elif not self._trust.anybody:
            found = sorted({c.key_id for c in self._chunks if c.key_id})
            self._fault(
                "unknown_key",
                None,
                "no trusted key is known, so nobody vouches for this chain",
                hint="name the key you trust: " + " ".join(f"--key sha256:{key}" for key in found[:3]),
            )
        if head is None or self._chain is None:
            if head is None and not self._declared:
                self._warn("no_head", None, "no head to compare the end with: a cut at the end would not show")
            return
        if head.chain_id != self._chain.chain_id:
            predecessor = self._chain.predecessor
            follows = predecessor is not None and predecessor.chain_id == head.chain_id
            # The new chain's own head is written right after its first signature.
            if not self._head_required and reset.is_aside(self._shown.name, self._chain.chain_id):
                self._warn("no_head", None, f"this chain was left; the head is of chain {head.chain_id}")
            elif not follows or self._last_signed > names.FIRST_INDEX:
                self._fault("spliced", None, f"the head is of chain {head.chain_id}")
            return
        if head.signed is not None and not self._signed_by_trusted(head.signed, str(self._head_path)):
            return
        # A part that a manifest declares may well end before the newest statement that is known.
        needed = head.declared or (0 if self._declared else head.index)
        after, before = self._last_signed + 1, head.previous
        if needed > self._last_signed:
            self._fault("truncated", after, f"the chain ends before chunk {needed}, which the head tells of")
        elif before and self._statements.get(before.index, before.statement_sha256) != before.statement_sha256:
            self._fault("forked", before.index, "the head follows another statement than the one that is here")
        elif self._statements.get(head.index, head.statement_sha256) != head.statement_sha256:
            self._fault("forked", head.index, "the head names another statement than the one that is here")
        elif self._at_head is not None and head.head is not None and self._at_head != head.head:
            self._fault("edited", head.index, "the head does not say what its chunk says")

    def _anchor(self) -> None:
        """Give the chunks before a logged one what it proves of them: it names them by digest, one by one."""
        anchor: ChunkReport | None = None
        for i in range(len(self._chunks) - 1, -1, -1):
            chunk = self._chunks[i]
            if chunk.log and chunk.status in (report.VALID_LOGGED, report.TIME_UNTRUSTED, report.ARCHIVED):
                anchor = chunk
            elif chunk.status not in (report.VALID_PENDING, report.ARCHIVED):
                anchor = None
            elif anchor is not None:
                status = report.VALID_LOGGED if anchor.trusted_time else report.TIME_UNTRUSTED
                self._chunks[i] = msgspec.structs.replace(
                    chunk,
                    status=chunk.status if chunk.status == report.ARCHIVED else status,
                    logged_by=anchor.index,
                )

    def _report(self, opened: OpenChunk | None, head: Pin | None) -> ChainReport:
        self._anchor()
        for chunk in self._chunks if self._require_log else []:
            if chunk.logged_by is None and chunk.status not in (report.INVALID, report.UNSIGNED):
                self._fault(
                    "not_logged", chunk.index, "no entry of a trusted log vouches for it, and one was asked for"
                )
        if self._unjudged:
            self._warn(
                "unjudged",
                None,
                f"{self._unjudged} chunks have log entries or timestamps, and no trusted root says "
                "whose count: name one with --trusted-root",
            )
        sums = [chunk.accounting for chunk in self._chunks if chunk.accounting]
        chain = self._chain
        faults = sorted(self._faults, key=lambda f: (f.chunk is None, f.chunk or 0))
        return ChainReport(
            format=1,
            valid=not faults,
            path=str(self._shown),
            chain_id=chain.chain_id if chain else "",
            node=chain.node if chain else "",
            created=chain.created if chain else "",
            predecessor=chain.predecessor if chain else None,
            state=extent.state(faults, self._first, self._last_signed, self._declared),
            first=self._first,
            last=self._last_signed,
            totals=Accounting(
                sum(s.produced for s in sums),
                sum(s.recorded for s in sums),
                sum(s.filtered for s in sums),
                sum(s.lost for s in sums),
            ),
            lost_by_cause=dict(sorted(self._lost.items())),
            filtered_by_cause=dict(sorted(self._filtered.items())),
            lines=sum(chunk.lines for chunk in self._chunks),
            bytes=sum(chunk.bytes for chunk in self._chunks),
            archived=Archived(
                sum(chunk.status == report.ARCHIVED for chunk in self._chunks),
                sum(chunk.lines for chunk in self._chunks if chunk.status == report.ARCHIVED),
                sum(chunk.bytes for chunk in self._chunks if chunk.status == report.ARCHIVED),
            ),
            notes=self._notes,
            chunks=self._chunks,
            open=opened,
            head=HeadCheck(str(self._head_path), head.index, head.statement_sha256)
            if head
            else extent.declared_end(self._declared),
            trusted_keys=sorted(self._trust.keys),
            trusted_identities=sorted(self._trust.identities),
            trusted_root_sha256=self._trust.root.sha256 if self._trust.root else "",
            faults=faults,
            warnings=self._warnings,
        )


def _look(directory: Path) -> dict[str, str]:
    """Return the names in a directory, sorted, with what each is."""
    with os.scandir(directory) as entries:
        found = {
            entry.name: "file"
            if entry.is_file(follow_symlinks=False)
            else "directory"
            if entry.is_dir(follow_symlinks=False)
            else "other"
            for entry in entries
        }
    return dict(sorted(found.items()))


def _read(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return a file's bytes.  Raises `ValueError` when it is no regular file, or longer than `limit`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no regular file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return data


def _shape(digest: Digest) -> tuple[int, int, str, str]:
    return digest.bytes, digest.lines, digest.merkle_root, digest.sha256


def _context(stated: Statement) -> statement.Context:
    """Return what of a statement is checked elsewhere (links), or cannot be (the signer's version)."""
    predicate = stated.predicate
    return statement.Context(
        predicate.host.node,
        predicate.chain.manifest_sha256,
        predicate.chain.predecessor,
        predicate.chain.previous,
        predicate.monitor.signer_version,
    )


def _status(codes: set[str], vouched: Vouched, *, signed: bool) -> str:
    """Return a chunk's status, given the codes of its faults."""
    if codes == {"untrusted_time"}:
        return report.TIME_UNTRUSTED
    if codes == {"unknown_key"}:
        return report.UNTRUSTED_KEY
    if codes:
        return report.INVALID
    if not signed:
        return report.UNSIGNED
    if not vouched.trusted:
        return report.UNTRUSTED_KEY
    if not vouched.logged:
        return report.VALID_PENDING
    return report.VALID_LOGGED if vouched.times else report.TIME_UNTRUSTED


def _chunk_report(
    index: int, status: str, ledger: Ledger | None, vouched: Vouched, statement_sha256: str
) -> ChunkReport:
    logged = vouched.logged[0] if vouched.logged else None
    who = vouched.identity
    known = ChunkReport(
        index,
        status,
        key_id=vouched.key_id,
        statement_sha256=statement_sha256,
        identity=who,
        trusted_time=earliest(vouched.times),
        log=logged.log if logged else "",
        log_index=logged.index if logged else None,
        logged_by=index if logged else None,
    )
    if ledger is None:
        return known
    return msgspec.structs.replace(
        known,
        lines=ledger.lines,
        bytes=ledger.bytes,
        start=ledger.window.start,
        end=ledger.window.end,
        close_reason=ledger.close_reason,
        chunk_sha256=ledger.sha256,
        accounting=records.accounting(ledger),
    )


def node_trust(state: Path) -> Trust:
    """Return whom a node trusts: its own keys and identities, and the root that it used last.

    Raises `NotPermitted` and `ConfigError` as `keys.load_trust`.
    """
    listed = keys.load_trust(state)
    path = state / TRUST / TRUSTED_ROOT
    try:
        root = parse_root(_read(path)) if path.exists() else None
    except PermissionError as e:
        raise NotPermitted(f"{path}: {e.strerror}", hint="run as the owner of the state directory") from None
    except ValueError as e:
        raise ConfigError(f"{path}: {e}", hint="remove it: the signer writes it anew from its configuration") from None
    return Trust(
        {key.key_id: key.not_after for key in listed.keys},
        frozenset(Identity(who.subject, who.issuer) for who in listed.identities),
        root,
    )
