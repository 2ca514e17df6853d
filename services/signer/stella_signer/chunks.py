"""The chunks on disk: the only module of the signer that writes files.

    open ──commit──▶ open ──close──▶ sealed ──sign──▶ signed        (─▶ stamped ─▶ logged: `submission`)

    commit   data, fsync; journal entry, fsync.  Only then may messages be acknowledged.
    close    NNNNNN.ledger.json whole; rename NNNNNN.open.ndjson.zst → NNNNNN.ndjson.zst; the journal goes,
             and the files of the notes that the ledger has taken in
    sign     NNNNNN.cert.pem and NNNNNN.stamps.json, for a keyless signature; NNNNNN.dsse.json whole; head.json whole

A crash at any system call leaves the state before or after that step, and which one it is shows in the files
alone.  `ChunkStore.open` finishes whatever was begun with the functions of the live path.  An `OSError` from
`commit`, `close` or `sign` means: nothing was lost, call again.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

from stella_shared.errors import BrokenPromise, ConfigError, TryAgain
from stella_shared.evidence import canonical, dsse, merkle, names, notes, records, statement
from stella_shared.evidence.compressed import Packed
from stella_shared.evidence.disk import TMP_SUFFIX, Disk
from stella_shared.evidence.lines import blocks
from stella_shared.evidence.records import Chain, Head, Ledger, Note, Window
from stella_shared.evidence.stamps import Stamps, encode_stamps
from stella_shared.evidence.statement import Previous
from stella_shared.evidence.store import SIGNER_LOCK, Places, read_chain, read_head
from stella_signer import journal
from stella_signer.account import Account
from stella_signer.signing import LocalKey, Signed
from stella_signer.steps import Step

_FILE_MODE: Final = 0o640
_REMOVED: Final = "removed under the running signer (stop the node and run: stella signals init)"
_RESTORE: Final = "restore the evidence from a backup, or move it away and run: stella signals init"


class ChunkStore:
    """The chain's end: one open chunk, and the step from each state to the next."""

    def __init__(
        self,
        where: Places,
        chain: Chain,
        key: LocalKey | None,
        *,
        remote: bool,
        version: str,
        now: Callable[[], str],
        disk: Disk,
    ) -> None:
        self._where = where
        self._chain = chain
        self._manifest_sha256 = sha256((where.evidence / names.CHAIN).read_bytes()).hexdigest()
        self._key = key
        self._signs = key is not None or remote
        self._version = version
        self._now = now
        self._disk = disk
        self._lock = -1
        self._data = self._journal = -1
        self._dirty = False
        self._sealing: Ledger | None = None
        self._envelope: tuple[int, bytes] | None = None
        self._to_sign: deque[int] = deque()
        self._last_ledger_sha256 = ""
        #: Notes of the newest closed chunk: their files may have outlived a crash.
        self._noted: frozenset[str] = frozenset()
        self._signed: Previous | None = None
        self.chunks_signed = 0
        #: Whether the open chunk was begun by an earlier life: close it as soon as no batch waits in it.
        self.recovering = False
        #: Commits that the journal tells of and whose data the disk had lost, at the last opening.
        self.commits_gone = 0
        self.account = Account([], [], [])
        self._begin(names.FIRST_INDEX, now())

    # -- what others may read --------------------------------------------------------------------------

    @property
    def chain_id(self) -> str:
        """The chain that is written."""
        return self._chain.chain_id

    @property
    def last_statement_sha256(self) -> str:
        """SHA-256 of the newest signed statement, "" before the first."""
        return self._signed.statement_sha256 if self._signed else ""

    @property
    def last_signed(self) -> int:
        """The newest signed chunk's index, 0 before the first."""
        return self._signed.index if self._signed else 0

    def is_settled(self, run: str, number: int) -> bool:
        """Return whether batch `number` of `run` is in the evidence, or is counted as lost for good."""
        return self.account.is_settled(run, number)

    def boot_of(self, run: str) -> str | None:
        """Return the boot that `run` belongs to, or None for a run not known."""
        return self.account.boot_of(run)

    # -- opening: whatever was begun is finished -------------------------------------------------------

    @classmethod
    def open(
        cls,
        where: Places,
        key: LocalKey | None,
        *,
        version: str,
        now: Callable[[], str],
        disk: Disk | None = None,
        remote: bool = False,
    ) -> ChunkStore:
        """Take the evidence directory over and finish what an earlier life began.

        A chunk that was open with something in it is closed as `recovery`, unless batches in it wait for an
        earlier one: then it stays open and `recovering` is true.  Sealed chunks are signed.  A chain without
        any chunk gets its `genesis` chunk, empty and signed at once, so that there is a signed beginning.
        `now` gives UTC as text.  With `remote`, signatures come from outside: `next_to_sign` and `signed`.
         Raises `ConfigError` for what no crash of ours can leave, `TryAgain` while
        another signer has it, `OSError` when the disk refuses (call again).
        """
        chain = read_chain(where.evidence)
        if chain is None:
            raise ConfigError(f"{where.evidence} holds no chain", hint="run: stella signals init")
        store = cls(where, chain, key, remote=remote, version=version, now=now, disk=disk or Disk())
        try:
            store._take_lock()
            store._recover()
        except BaseException:
            store.release()
            raise
        return store

    def release(self) -> None:
        """Let go of files and lock.  Nothing is written; what is open stays open on disk."""
        self._close_files()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_lock(self) -> None:
        self._lock = os.open(self._where.state / SIGNER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TryAgain(
                f"another signer writes to {self._where.evidence}",
                hint="one signer at a time writes a chain: stop the other one, or this one",
            ) from None

    def _recover(self) -> None:
        # A rename that an earlier try saw fail may be visible and not durable; a head must not get ahead of it.
        self._disk.sync_directory(self._where.evidence)
        kinds = self._listing()
        opened = max(kinds, default=0)
        if names.OPEN_DATA in kinds.get(opened, set()) and names.LEDGER in kinds[opened]:
            # It died between the ledger and the rename.
            ledger, _ = self._read_ledger(opened)
            self._check_data(ledger, names.OPEN_DATA)
            self._begin(opened, "")
            self._sealing = ledger
            self._finish_seal()
            kinds = self._listing()
        closed = sorted(
            index for index, files in kinds.items() if names.DATA in files or {names.LEDGER, names.ENVELOPE} <= files
        )
        if any(names.LEDGER not in kinds[index] for index in closed) or closed != list(
            range(closed[0] if closed else 0, (closed[-1] if closed else -1) + 1)
        ):
            raise ConfigError(f"{self._where.evidence} has gaps", hint=_RESTORE)
        self._check_removed({index for index in closed if names.DATA not in kinds[index]}, closed)
        self._stand_after(closed, kinds)
        self._check_head()
        self.sign()
        self._recover_open(kinds)
        if not closed and self._index == names.FIRST_INDEX and not self.account.batches:
            self.close("genesis")

    def _listing(self) -> dict[int, set[str]]:
        """Return the kinds of file of each chunk; remove what was being written and means nothing."""
        kinds: dict[int, set[str]] = {}
        for entry in sorted(self._where.evidence.iterdir()):
            if entry.name.endswith(TMP_SUFFIX) and names.parse_chunk_file(entry.name.removesuffix(TMP_SUFFIX)):
                self._disk.remove(entry)
            elif file := names.parse_chunk_file(entry.name):
                kinds.setdefault(file.index, set()).add(file.kind)
        return kinds

    def _check_removed(self, bare: set[int], closed: list[int]) -> None:
        """Refuse to write on where lines are gone and no note says that they were cleaned up."""
        try:
            lost = notes.unaccounted(self._where, bare, closed)
        except ValueError as e:
            raise ConfigError(f"a ledger in {self._where.evidence}: {e}", hint=_RESTORE) from None
        if lost:
            path = self._where.chunk(min(lost), names.DATA)
            raise ConfigError(f"{path} is missing, and no cleanup of it is noted", hint=_RESTORE)

    def _stand_after(self, closed: list[int], kinds: dict[int, set[str]]) -> None:
        """Continue after the newest closed chunk, or after the chain before this one."""
        if closed:
            ledger, digest = self._read_ledger(closed[-1])
            self._follow(ledger, digest, self._now())
            notes.drop(self._where, self._noted, self._disk)
        elif (head := read_head(self._where)) and self._chain.predecessor:
            self.account = Account(head.runs, head.ended_runs, [])
        unsigned = [index for index in closed if names.ENVELOPE not in kinds[index]]
        signed = closed[: len(closed) - len(unsigned)]
        if unsigned and signed and unsigned[0] < signed[-1]:
            raise ConfigError(f"chunk {unsigned[0]} is not signed, but a later one is", hint=_RESTORE)
        for index in unsigned if self._signs else []:
            self._check_data(self._read_ledger(index)[0], names.DATA)
        self._to_sign = deque(unsigned if self._signs else [])
        if signed:
            ledger, _ = self._read_ledger(signed[-1])
            self._signed, key_id = self._read_envelope(signed[-1])
            self._put_head(records.head_of(ledger, self._signed.statement_sha256, key_id))

    def _check_head(self) -> None:
        """Refuse to write beside a history that was longer: that would fork the chain."""
        head = read_head(self._where)
        if head is None:
            return
        predecessor = self._chain.predecessor
        here = self._signed.index if self._signed else 0
        if head.chain_id == self._chain.chain_id:
            if head.index > here:
                raise ConfigError(
                    f"the evidence ends at chunk {here}, but chunk {head.index} was signed before", hint=_RESTORE
                )
        elif here or predecessor is None or predecessor.chain_id != head.chain_id:
            raise ConfigError(
                f"{self._where.head} tells of chain {head.chain_id}, the evidence is chain {self._chain.chain_id}",
                hint="if this evidence is the right one, remove that file: it is rebuilt",
            )

    def _put_head(self, head: Head) -> None:
        """Write head.json when it is missing or behind; one that is ahead is for `_check_head`."""
        old = read_head(self._where)
        predecessor = self._chain.predecessor
        replaces = (
            old is None
            or (old.chain_id == head.chain_id and old.index < head.index)
            or (predecessor is not None and old.chain_id == predecessor.chain_id and head.chain_id != old.chain_id)
        )
        if replaces:
            self._disk.put(self._where.head, canonical.dumps(head), 0o600)

    def _recover_open(self, kinds: dict[int, set[str]]) -> None:
        """Take up the open chunk: cut it to what was acknowledged, and close it when there is anything in it."""
        for index in kinds:
            if index < self._index:
                self._disk.remove(self._where.chunk(index, names.OPEN_JOURNAL))
        data_path = self._where.chunk(self._index, names.OPEN_DATA)
        journal_path = self._where.chunk(self._index, names.OPEN_JOURNAL)
        if not data_path.exists() and not journal_path.exists():
            return
        replay = journal.replay(journal_path.read_bytes() if journal_path.exists() else b"")
        opening = replay.opening
        if opening is None:
            if data_path.exists() and data_path.stat().st_size:
                raise ConfigError(f"{journal_path} is gone, so nothing says what is in {data_path}", hint=_RESTORE)
            self._disk.remove(journal_path)
            return
        if (opening.format, opening.chain_id, opening.index) != (records.FORMAT, self.chain_id, self._index):
            raise ConfigError(f"{journal_path} is of another chunk", hint=_RESTORE)
        self._opened = opening.opened
        end, journal_bytes = self._replay(replay)
        self._open_files()
        self._journal_bytes = journal_bytes or replay.opening_bytes
        self._restore()
        if end and not self.account.early():
            self.close("recovery", end)
        # Otherwise batches in it wait for one that the bus will bring again: it goes on as it is.
        self.recovering = bool(end) and bool(self.account.early())

    def _replay(self, replay: journal.Replay) -> tuple[str, int]:
        """Apply the commits whose data is there; return the time of the last and the journal's length after it."""
        end, journal_bytes = "", 0
        path = self._where.chunk(self._index, names.OPEN_DATA)
        with path.open("rb") if path.exists() else open(os.devnull, "rb") as file:
            for commit, size in zip(replay.commits, replay.sizes, strict=True):
                frames = file.read(commit.offset - self._file_bytes) if commit.offset > self._file_bytes else b""
                digest = self._hash.copy()
                digest.update(frames)
                if digest.digest() != commit.sha256:
                    # The disk gave back less than it had promised.  What is gone shows as missing batches.
                    break
                try:
                    body = Packed.read(frames)
                except ValueError as e:
                    raise ConfigError(f"{path} is what was written, and holds no lines: {e}", hint=_RESTORE) from None
                self._add(body, digest, commit.steps)
                end, journal_bytes = commit.at, size
                self.commits_gone -= 1
        self.commits_gone += len(replay.commits)
        return end, journal_bytes

    def _read_ledger(self, index: int) -> tuple[Ledger, str]:
        path = self._where.chunk(index, names.LEDGER)
        data = path.read_bytes()
        try:
            ledger = canonical.loads(data, Ledger)
        except ValueError as e:
            raise ConfigError(f"{path}: {e}", hint=_RESTORE) from None
        if (ledger.format, ledger.chain_id, ledger.index) != (records.FORMAT, self.chain_id, index):
            raise ConfigError(f"{path} is of another chunk, or of a format not known here", hint=_RESTORE)
        return ledger, sha256(data).hexdigest()

    def _read_envelope(self, index: int) -> tuple[Previous, str]:
        path = self._where.chunk(index, names.ENVELOPE)
        try:
            opened = dsse.open_envelope(path.read_bytes())
            stated = statement.decode(opened.payload)
        except ValueError as e:
            raise ConfigError(f"{path}: {e}", hint=_RESTORE) from None
        link = stated.predicate.chain
        if (link.id, link.index) != (self.chain_id, index):
            raise ConfigError(f"{path} is of another chunk", hint=_RESTORE)
        digest = stated.subject[0].digest.get("sha256", "")
        return Previous(index, digest, sha256(opened.payload).hexdigest()), opened.key_id

    def _check_data(self, ledger: Ledger, kind: str) -> None:
        """Make sure that what is about to be signed is what was closed."""
        digest = sha256()
        path = self._where.chunk(ledger.index, kind)
        for block in blocks(path):
            digest.update(block)
        if digest.hexdigest() != ledger.sha256:
            raise ConfigError(f"{path} is not what its ledger describes", hint=_RESTORE)

    # -- the open chunk --------------------------------------------------------------------------------

    def _begin(self, index: int, opened: str) -> None:
        """Stand before an empty chunk.  Its files are made when there is something to write."""
        self._index = index
        self._opened = opened
        self._hash = sha256()
        self._tree = merkle.frontier()
        self._journal_bytes = self._file_bytes = 0
        #: Length of the lines; in the file they take less.
        self.bytes = 0
        self.recovering = False

    @property
    def index(self) -> int:
        """The open chunk's index."""
        return self._index

    @property
    def lines(self) -> int:
        """Lines in the open chunk."""
        return self._tree.size

    @property
    def journal_bytes(self) -> int:
        """Length of the open chunk's journal."""
        return self._journal_bytes

    def commit(self, steps: list[Step], bodies: list[Packed]) -> None:
        """Make batches durable.  Frames are appended as they come, and were looked at by the caller.

        After this returns, and not before, they may be acknowledged."""
        self.sign()
        self._open_files()
        if self._dirty:
            self._restore()
        body = Packed.join(bodies)
        digest = self._hash.copy()
        digest.update(body.frames)
        end = self._file_bytes + len(body.frames)
        entry = journal.frame(journal.Commit(end, digest.digest(), self._now(), steps))
        self._dirty = True
        if body.frames:
            self._disk.write(self._data, body.frames)
            self._disk.sync(self._data)
        self._disk.write(self._journal, entry)
        self._disk.sync(self._journal)
        if os.fstat(self._data).st_nlink == 0:
            raise OSError(errno.ENOENT, _REMOVED, str(self._where.chunk(self._index, names.OPEN_DATA)))
        self._dirty = False
        self._journal_bytes += len(entry)
        self._add(body, digest, steps)

    def _add(self, body: Packed, digest: Any, steps: list[Step]) -> None:
        """Take durable lines and their steps into the running sums."""
        self._tree.add_hashes(body.leaves)
        self._hash = digest
        self.bytes += body.length
        self._file_bytes += len(body.frames)
        for step in steps:
            self.account.apply(step)

    def _open_files(self) -> None:
        if self._data >= 0:
            return
        if self._journal >= 0:
            os.close(self._journal)
        journal_path = self._where.chunk(self._index, names.OPEN_JOURNAL)
        data_path = self._where.chunk(self._index, names.OPEN_DATA)
        self._journal = self._disk.create(journal_path, _FILE_MODE)
        if not self._journal_bytes and not os.fstat(self._journal).st_size:
            # The opening is durable before there is a data file, so a data file always has its journal.
            self._write_opening()
            self._disk.sync_directory(self._where.evidence)
        self._data = self._disk.create(data_path, _FILE_MODE)
        self._disk.sync_directory(self._where.evidence)
        self._dirty = True

    def _write_opening(self) -> None:
        opening = journal.frame(journal.Opening(records.FORMAT, self.chain_id, self._index, self._opened))
        self._disk.truncate(self._journal, 0)
        self._disk.write(self._journal, opening)
        self._disk.sync(self._journal)
        self._journal_bytes = len(opening)

    def _restore(self) -> None:
        """Cut both files to the last commit: after a failed write nobody knows what is behind it."""
        if not self._journal_bytes:
            self._write_opening()
        self._disk.truncate(self._data, self._file_bytes)
        self._disk.truncate(self._journal, self._journal_bytes)
        self._disk.sync(self._data)
        self._disk.sync(self._journal)
        self._dirty = False

    def _close_files(self) -> None:
        for fd in (self._data, self._journal):
            if fd >= 0:
                os.close(fd)
        self._data = self._journal = -1

    # -- closing and signing ---------------------------------------------------------------------------

    def close(self, reason: str, end: str = "") -> None:
        """Close the open chunk, sign it, and stand before the next one.

        `end` is the end of its window, now by default.  The caller sees to it that no batch waits for an
        earlier one.  When this raised, calling it again finishes the same closing.
        """
        if self._sealing is not None or (self._to_sign and self._key):
            self.sign()
            return
        self._open_files()
        if self._dirty:
            self._restore()
        self._sealing = Ledger(
            records.FORMAT,
            self.chain_id,
            self._index,
            self._last_ledger_sha256,
            self._tree.size,
            self.bytes,
            self._hash.hexdigest(),
            self._tree.root().hex(),
            Window(self._opened, end or self._now(), self.account.boots()),
            reason,
            self.account.runs(),
            self.account.ended_runs(),
            dict(sorted(self.account.filtered.items())),
            dict(sorted(self.account.lost.items())),
            self.account.coverage(),
            self.waiting_notes()[: notes.MAX_NOTES],
        )
        self._finish_seal()
        self.sign()

    def waiting_notes(self) -> list[Note]:
        """Return the notes that the next closing takes in."""
        return [n for n in notes.waiting(self._where, self.chain_id) if n.id not in self._noted]

    def _finish_seal(self) -> None:
        """Carry a decided closing through.  Each step may have been done before."""
        ledger = self._sealing
        if ledger is None:
            return
        opened, closed = self._where.chunk(ledger.index, names.OPEN_DATA), self._where.chunk(ledger.index, names.DATA)
        data = canonical.dumps(ledger)
        self._disk.put(self._where.chunk(ledger.index, names.LEDGER), data)
        if opened.exists():
            self._disk.rename(opened, closed)
        elif not closed.exists():
            raise OSError(errno.ENOENT, _REMOVED, str(opened))
        self._disk.sync_directory(self._where.evidence)
        self._disk.remove(self._where.chunk(ledger.index, names.OPEN_JOURNAL))
        notes.drop(self._where, [note.id for note in ledger.notes], self._disk)
        self._close_files()
        self._sealing = None
        if self._signs:
            self._to_sign.append(ledger.index)
        self._follow(ledger, sha256(data).hexdigest(), ledger.window.end)

    def _follow(self, ledger: Ledger, digest: str, opened: str) -> None:
        self._last_ledger_sha256 = digest
        self._noted = frozenset(note.id for note in ledger.notes)
        self.account = Account(ledger.runs, ledger.ended_runs, ledger.coverage)
        self._begin(ledger.index + 1, opened)

    def sign(self) -> None:
        """Sign every sealed chunk that is not signed yet, in order, with the local key if there is one."""
        self._finish_seal()
        while self._key and (waiting := self.next_to_sign()):
            index, payload = waiting
            if self._envelope is None or self._envelope[0] != index:
                self._envelope = index, self._key.envelope(payload)
            self.signed(index, Signed(self._envelope[1], self._key.key_id))
            self._envelope = None

    def next_to_sign(self) -> tuple[int, bytes] | None:
        """Return the first sealed chunk that is not signed, and the statement to sign; None when there is none."""
        if not self._to_sign:
            return None
        index = self._to_sign[0]
        ledger, digest = self._read_ledger(index)
        context = statement.Context(
            self._chain.node, self._manifest_sha256, self._chain.predecessor, self._signed, self._version
        )
        return index, statement.encode(statement.build(ledger, digest, context))

    def signed(self, index: int, made: Signed) -> None:
        """Keep the signature of the chunk that `next_to_sign` told of.  The envelope is last: with it, all is there.

        When this raised `OSError`, call it again with the same signature.
        """
        if not self._to_sign or self._to_sign[0] != index:
            raise BrokenPromise(f"chunk {index} is not the one to be signed")
        ledger, _ = self._read_ledger(index)
        if made.certificate:
            self._disk.put(self._where.chunk(index, names.CERTIFICATE), made.certificate)
        if made.timestamps:
            self._disk.put(self._where.chunk(index, names.STAMPS), encode_stamps(Stamps.of(made.timestamps)))
        self._disk.put(self._where.chunk(index, names.ENVELOPE), made.envelope)
        statement_sha256 = sha256(dsse.open_envelope(made.envelope).payload).hexdigest()
        self._put_head(records.head_of(ledger, statement_sha256, made.key_id))
        self._signed = Previous(index, ledger.sha256, statement_sha256)
        self._to_sign.popleft()
        self.chunks_signed += 1
