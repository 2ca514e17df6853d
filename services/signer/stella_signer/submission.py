"""From signed to logged: the queue is the files, so an outage of days, a crash or two runs at once lose nothing.

    NNNNNN.dsse.json ─▶ NNNNNN.stamps.json (timestamps) ─▶ NNNNNN.sigstore.json (the bundle, with its log entry)

A bundle is written only after our own offline verification has accepted it.  Whoever submits holds
`submit.lock` in the state directory for one round; what it finds done is done.  A crash at any step leaves the
step before: the same bytes are submitted again, the log says 409, and that is success.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any, Final

import anyio
import anyio.to_thread
import msgspec
from cryptography import x509

from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence import canonical, dsse, keys, names
from stella_shared.evidence.disk import Disk
from stella_shared.evidence.records import Ledger
from stella_shared.evidence.stamps import Stamps, decode_stamps, encode_stamps
from stella_shared.evidence.store import Places
from stella_shared.evidence.transparency import bundle as bundles
from stella_shared.evidence.transparency import certificate as certificates
from stella_shared.evidence.transparency import proof_of_log
from stella_shared.evidence.transparency.bundle import TlogEntry
from stella_shared.evidence.transparency.entry import Verifier
from stella_signer import rekor, tsa
from stella_signer.outside import Frozen, Later, Outside, Refused
from stella_signer.trust_config import Service, Services
from stella_signer.witness import TwoHistories, Witness

LOCK: Final = "submit.lock"
REJECTED: Final = "rejected.json"
_BACKOFF_SECONDS: Final = 300.0
#: A chunk is submitted at least this often, whatever `submit_every` says.
_ANCHOR_SECONDS: Final = 3600.0
_LOCK_TRIES: Final = 600


class _Rejected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rejected.json`: chunks that the log will not take, and why.  An operator looks at them."""

    format: int
    chunks: dict[str, str]


class Round(msgspec.Struct):
    """What one round did."""

    logged: int = 0
    left: int = 0
    rejected: int = 0
    error: str = ""
    after_seconds: float = 0.0


class Submitter:
    """Submits a chain's signed chunks.  Its counters may be read at any time."""

    def __init__(
        self,
        where: Places,
        outside: Outside,
        services: Services,
        *,
        read_url: str = "",
        every: int = 1,
        parallel: int = 4,
        disk: Disk | None = None,
        on_logged: Callable[[int], None] = lambda index: None,
    ) -> None:
        self._where = where
        self._outside = outside
        self._services = services
        self._read_url = read_url
        self._every = every
        self._parallel = parallel
        self._disk = disk or Disk()
        self._on_logged = on_logged
        self._witness = Witness(where.state, self._disk)
        self._frozen: set[str] = set()
        self._failures = 0
        self.failures_total = 0
        self.logged_total = 0
        self.pending = 0
        self.last_logged = 0
        self.last_error = ""
        #: Set when the log contradicted itself: nothing more is submitted until somebody has looked.
        self.alarm = ""

    # -- what there is to do ---------------------------------------------------------------------------

    def due(self, *, retry_rejected: bool = False) -> list[int]:
        """Return the chunks that are to be submitted and have no bundle yet, in order."""
        kinds: dict[int, set[str]] = {}
        for entry in os.scandir(self._where.evidence):
            if file := names.parse_chunk_file(entry.name):
                kinds.setdefault(file.index, set()).add(file.kind)
        signed = sorted(index for index, files in kinds.items() if names.ENVELOPE in files)
        logged = {index for index in signed if names.BUNDLE in kinds[index]}
        self.last_logged = max(logged, default=0)
        rejected = set() if retry_rejected else set(self.rejected())
        wanted = signed if self._every == 1 else self._anchors(signed, logged)
        return [index for index in wanted if index not in logged and index not in rejected]

    def _anchors(self, signed: list[int], logged: set[int]) -> list[int]:
        """Return the chunks that vouch for those before them, by `submit_every`.

        What lies before the newest logged chunk is anchored by it already.
        """
        newest = max(logged, default=0)
        last = self._end(newest) if newest else None
        found: list[int] = []
        for index in signed:
            if index <= newest:
                continue
            ledger = self._ledger(index)
            end = _time(ledger.window.end)
            hour = last is not None and (end - last).total_seconds() >= _ANCHOR_SECONDS
            if (not found and not newest) or index % self._every == 0 or hour or ledger.close_reason == "stop":
                found.append(index)
                last = end
        return found

    def _ledger(self, index: int) -> Ledger:
        return canonical.loads(self._where.chunk(index, names.LEDGER).read_bytes(), Ledger)

    def _end(self, index: int) -> datetime:
        return _time(self._ledger(index).window.end)

    def rejected(self) -> dict[int, str]:
        """Return the chunks that the log refused for good, with its reasons."""
        try:
            listed = canonical.loads((self._where.state / REJECTED).read_bytes(), _Rejected)
        except FileNotFoundError:
            return {}
        except ValueError as e:
            raise ConfigError(f"{self._where.state / REJECTED}: {e}", hint="remove it: it is made again") from None
        return {int(index): reason for index, reason in listed.chunks.items() if index.isdigit()}

    def _reject(self, index: int, reason: str | None) -> None:
        now = self.rejected()
        if reason is None and index not in now:
            return
        now.pop(index, None)
        if reason is not None:
            now[index] = reason[:300]
        listed = _Rejected(1, {str(i): text for i, text in sorted(now.items())})
        self._disk.put(self._where.state / REJECTED, canonical.dumps(listed), 0o600)

    # -- rounds ----------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Hold the lock against another submitter on this chain: the node and `resubmit-pending` may meet."""
        fd = os.open(self._where.state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for _ in range(_LOCK_TRIES):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await anyio.sleep(0.1)
            else:
                raise TryAgain("another submission of this chain has been under way for a minute")
            yield
        finally:
            os.close(fd)

    async def round(self, *, retry_rejected: bool = False, most: int = 64) -> Round:
        """Submit what is due, up to `most` chunks.  After a failure one chunk is tried first.  Never raises for it."""
        done = Round()
        if self.alarm:
            done.error, done.after_seconds = self.alarm, _BACKOFF_SECONDS
            return done
        async with self._alone():
            due = await anyio.to_thread.run_sync(lambda: self.due(retry_rejected=retry_rejected))
            self.pending = len(due)
            batch = due[:most]
            if self._failures and batch:
                await self._one(batch[0], done)
                batch = batch[1:]
            if not done.error:
                await self._many(batch, done)
            done.left = self.pending = len(due) - done.logged - done.rejected
        return done

    async def _many(self, batch: list[int], done: Round) -> None:
        waiting = iter(batch)

        async def worker() -> None:
            for index in waiting:
                if done.error:
                    return
                await self._one(index, done)

        async with anyio.create_task_group() as tasks:
            for _ in range(min(self._parallel, len(batch))):
                tasks.start_soon(worker)

    async def _one(self, index: int, done: Round) -> None:
        """Take one chunk through, and sort a failure into `done`."""
        refused = ""
        try:
            try:
                await self._log(index)
            except Refused as e:
                refused = str(e)
                self._reject(index, refused)
        except Later as e:
            self._failed(done, str(e), e.after_seconds)
        except TwoHistories as e:
            self.alarm = str(e)
            self._failed(done, str(e), _BACKOFF_SECONDS)
        except (ConfigError, Frozen) as e:
            self._failed(done, str(e), 0.0)
        except OSError as e:
            self._failed(done, f"{e.filename or 'evidence'}: {e.strerror}", 0.0)
        else:
            if refused:
                self.failures_total += 1
                self.last_error = f"chunk {index}: {refused}"
                done.rejected += 1
                return
            self._failures = 0
            done.logged += 1
            self.logged_total += 1
            self.last_logged = max(self.last_logged, index)
            self._on_logged(index)

    def _failed(self, done: Round, reason: str, after_seconds: float) -> None:
        self._failures += 1
        self.failures_total += 1
        self.last_error = done.error = reason
        # Full jitter: many nodes that lost the same log do not come back at once.
        pause = random.uniform(0, min(_BACKOFF_SECONDS, 2.0 ** min(self._failures, 12)))
        done.after_seconds = max(done.after_seconds, after_seconds, pause)

    # -- one chunk -------------------------------------------------------------------------------------

    async def _log(self, index: int) -> None:
        """Stamp, submit, verify, keep."""
        envelope = self._where.chunk(index, names.ENVELOPE).read_bytes()
        verifier = self.verifier(index)
        stamps = await self._stamps(index, envelope)
        taken = await self._submitted(envelope, verifier)
        try:
            entries = [entry for _, entry in taken]
            data = await anyio.to_thread.run_sync(self._bundle, envelope, verifier, entries, stamps)
            for service, entry in taken:
                log = self._services.root.log(canonical.base64_bytes(entry.log_id.key_id))
                await self._witness.saw(entry.inclusion_proof.checkpoint.envelope, log, self._door(service))
        except ValueError as e:
            raise Later(f"the log's answer does not hold: {e}") from None
        # First, so that a chunk with a bundle, which is never looked at again, does not stay in the list.
        self._reject(index, None)
        self._disk.put(self._where.chunk(index, names.BUNDLE), data)

    def verifier(self, index: int) -> Verifier:
        """Return what chunk `index` is verified with: its certificate's key, or one out of `keys/`."""
        try:
            certificate = certificates.load(self._where.chunk(index, names.CERTIFICATE).read_bytes())
        except FileNotFoundError:
            pass
        except ValueError as e:
            raise Refused(f"its certificate: {e}") from None
        else:
            return proof_of_log.verifier_of(None, certificate)
        try:
            opened = dsse.open_envelope(self._where.chunk(index, names.ENVELOPE).read_bytes())
            pem = (self._where.evidence / names.KEYS / f"{opened.key_id}.pem").read_bytes()
            return Verifier(keys.load_public(pem))
        except FileNotFoundError as e:
            raise Refused(f"{e.filename} is missing") from None
        except ValueError as e:
            raise Refused(f"its key: {e}") from None

    async def _stamps(self, index: int, envelope: bytes) -> list[bytes]:
        """Return the chunk's timestamps; they are fetched once and kept before the log is asked."""
        path = self._where.chunk(index, names.STAMPS)
        if path.exists():
            try:
                return decode_stamps(path.read_bytes())
            except ValueError as e:
                raise Refused(f"{path.name}: {e}") from None
        if not self._services.tsas:
            return []
        signature = dsse.open_envelope(envelope).signature
        found = await tsa.stamp(self._outside, self._services, signature)
        self._disk.put(path, encode_stamps(Stamps.of(found)))
        return found

    def _door(self, service: Service) -> rekor.RekorLog:
        return rekor.connect(
            self._outside, service.url, service.major_api_version, self._read_url, self._services.root.logs
        )

    async def _submitted(self, envelope: bytes, verifier: Verifier) -> list[tuple[Service, TlogEntry]]:
        """Return the entries of as many logs as are wanted; one that is closed for good is passed over from then on."""
        taken: list[tuple[Service, TlogEntry]] = []
        for service in self._services.logs:
            if service.url in self._frozen:
                continue
            try:
                taken.append((service, await self._door(service).submit(envelope, verifier)))
            except Frozen as e:
                self._frozen.add(service.url)
                self.last_error = str(e)
            if len(taken) == self._services.logs_wanted:
                return taken
        if not self._services.logs:
            raise Later("the signing config names no log that is valid now")
        raise Later("logs of the signing config are closed for good (frozen); a newer signing config is needed", 60.0)

    @property
    def needs_new_services(self) -> bool:
        """Whether too many of the known logs are closed, so that the trust configuration should be read anew."""
        still_open = sum(service.url not in self._frozen for service in self._services.logs)
        return still_open < self._services.logs_wanted

    def replace_services(self, services: Services) -> None:
        """Use another trust configuration from the next chunk on."""
        self._services = services

    def _bundle(self, envelope: bytes, verifier: Verifier, entries: list[TlogEntry], stamps: list[bytes]) -> bytes:
        """Return the bundle's bytes after our own offline verification has accepted them.  Raises `ValueError`."""
        bundle = bundles.assemble(
            envelope,
            hint="" if verifier.certificate else keys.key_hint(keys.key_id(verifier.key)),
            certificate=verifier.certificate,
            entries=[_without_late_promise(entry, verifier) for entry in entries],
            timestamps=stamps,
        )
        data = bundles.encode(bundle)
        proof_of_log.check(data, envelope, verifier, self._services.root)
        return data


def _without_late_promise(entry: TlogEntry, verifier: Verifier) -> TlogEntry:
    """Leave out a v1 log's promise when it came after a keyless certificate had ended.

    Then the timestamp within the certificate's life is the trusted time; verifiers want every time they are
    shown to lie there.
    """
    if not verifier.certificate or entry.integrated_time is None:
        return entry
    ended = x509.load_der_x509_certificate(verifier.certificate).not_valid_after_utc.timestamp()
    if int(entry.integrated_time) <= ended:
        return entry
    return msgspec.structs.replace(entry, integrated_time=None, inclusion_promise=None)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text[:26] + "+00:00")


def describe(submitter: Submitter) -> dict[str, Any]:
    """Return what `stella signer status` shows of the queue."""
    return {
        "pending": submitter.pending,
        "last_logged": submitter.last_logged,
        "logged": submitter.logged_total,
        "failures": submitter.failures_total,
        "rejected": len(submitter.rejected()),
        "alarm": submitter.alarm,
        "last_submission_error": submitter.last_error,
        "at": int(time.time()),
    }
