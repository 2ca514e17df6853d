"""Verifies a chain of evidence: no network, no private key, nothing but files.

    verify_chain(path) → read head and trust → list → chunk by chunk: signature, statement, ledger, bytes,
    links, identity, lanes, lines → the end against the head → ChainReport

Every disagreement becomes a `Fault` with its own code; the walk goes on after one, so that a report names
them all.  The evidence may be written to meanwhile: the head is read first, then the directory is listed.
"""

from __future__ import annotations

import contextlib
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
    comparison,
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
    verdicts,
)
from stella_shared.evidence.chunk_reader import ChunkReader
from stella_shared.evidence.comparison import Known, Read, Surroundings
from stella_shared.evidence.directory import Directory, read
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
from stella_shared.evidence.store import HEAD, SIGNER_LOCK
from stella_shared.evidence.transparency import bundle, certificate
from stella_shared.evidence.trusted import node_trust
from stella_shared.evidence.vouching import Files, Trust, Vouched, clock_ahead, earliest, form_code, vouch

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
        self._before: Known | None = None
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
            data = read(self._head_path)
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
            pin = pins.read(data)
            if self._head_path.name == HEAD and pin.head is None:
                raise ValueError("something else stands in the place of the head")
            return pin
        except ValueError as e:
            self._fault(form_code(e), None, f"{self._head_path}: {e}")
            return None

    # -- the directory ---------------------------------------------------------------------------------

    def run(self) -> ChainReport:
        """Walk the whole chain."""
        head = self._read_head()
        here = Directory(self._directory, self._own)
        here.look()
        self._keys = here.keys
        self._read_manifest()
        self._faults += here.faults
        self._warnings += here.warnings
        for name in self._strange:
            self._fault("inserted", None, f"{name} is no file of an evidence directory")
        self._read_declared(here.manifests())
        with ChunkReader() as self._reader:
            self._walk(here.kinds, head)
        self._settle_bare()
        self._check_declared()
        self._check_end(head)
        return self._report(here.opened, head)

    def _read_manifest(self) -> None:
        try:
            data = read(self._directory / names.CHAIN)
            self._manifest_sha256 = sha256(data).hexdigest()
            chain = canonical.loads(data, Chain)
            if chain.format != records.FORMAT:
                raise ValueError(f"format {chain.format} is not known here")
            self._chain = chain
        except FileNotFoundError:
            self._fault("missing", None, f"{names.CHAIN} is missing")
        except ValueError as e:
            self._fault(form_code(e), None, f"{names.CHAIN}: {e}")

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
        limit = ledger.bytes if ledger else 0
        digest = self._digest(index, checker, limit) if names.DATA in files else None
        self._hold(Read(index, stated, ledger, ledger_sha256, form, digest))
        if ledger is not None:
            data_is_signed = digest is not None and digest.sha256 == ledger.sha256 and not digest.damage
            self._identity(index, ledger, checker if data_is_signed else None)
            for message in notes.form_faults(ledger):
                self._fault("malformed", index, message)
            self._notes += [ChunkNote(index, note) for note in ledger.notes]
        if unsigned_tail:
            self._warn("unsigned", index, "closed, and not signed yet: nothing vouches for it")
        status = verdicts.status(
            {fault.code for fault in self._faults[faults_before:]}, vouched, signed=not unsigned_tail
        )
        self._chunks.append(verdicts.chunk_report(index, status, ledger, vouched, statement_sha256))
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
        self._before = Known(index, ledger, ledger_sha256, chunk_sha256, statement_sha256)
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

        def beside_it(kind: str, limit: int) -> bytes | None:
            return read(self._directory / names.chunk_file(index, kind), limit) if kind in files else None

        name = names.chunk_file(index, names.ENVELOPE)
        try:
            envelope = beside_it(names.ENVELOPE, dsse.MAX_ENVELOPE_BYTES) or b""
            beside = Files(
                beside_it(names.CERTIFICATE, certificate.MAX_BYTES),
                beside_it(names.STAMPS, bundle.MAX_BYTES),
                beside_it(names.BUNDLE, bundle.MAX_BYTES),
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
            return read(self._directory / names.chunk_file(index, names.LEDGER))
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

    def _digest(self, index: int, checker: LineChecker | None, limit: int) -> Digest | None:
        path = self._directory / names.chunk_file(index, names.DATA)
        try:
            return self._reader.read(path, checker, self._count, limit=limit)
        except ValueError as e:
            self._fault("malformed", index, str(e))
            return None

    def _hold(self, chunk: Read) -> None:
        """Hold a chunk's parts against each other, and against the chunk before."""
        around = Surroundings(self._chain, self._manifest_sha256, self._before)
        self._faults += comparison.faults(chunk, around)
        if chunk.stated is not None:
            self._faults += comparison.link_faults(chunk.index, chunk.stated, around)

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
        self._hold(Read(index, stated, ledger, ledger_sha256, form, None))
        if stated is not None:
            self._statements[index] = statement_sha256
        self._stand(index, ledger, ledger_sha256, stated, statement_sha256)

    def _read_declared(self, manifests: list[str]) -> None:
        """Read the manifests: they say which part of the chain this is.  Each must be signed by a trusted key."""
        for name in manifests:
            try:
                found, opened = manifest.open_signed(read(self._directory / name, manifest.MAX_ENVELOPE_BYTES))
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

    def _report(self, opened: OpenChunk | None, head: Pin | None) -> ChainReport:
        verdicts.anchor(self._chunks)
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
            if head and (chain is None or head.chain_id == chain.chain_id)
            else extent.declared_end(self._declared),
            trusted_keys=sorted(self._trust.keys),
            trusted_identities=sorted(self._trust.identities),
            trusted_root_sha256=self._trust.root.sha256 if self._trust.root else "",
            faults=faults,
            warnings=self._warnings,
        )
