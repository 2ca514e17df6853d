"""All that leaves the node: signatures made elsewhere, timestamps, submissions.  None of it holds up the evidence.

    sealed chunks ─▶ RemoteKey.sign ─▶ ChunkStore.signed       (a KMS, or keyless; a local key signs in place)
    signed chunks ─▶ Submitter.round ─▶ NNNNNN.sigstore.json   (when `submit_to_rekor` is on)

Two tasks of the signer.  What fails is told in the heartbeat and tried again, for as long as it takes.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol

import anyio
import anyio.to_thread

from stella_shared import metrics
from stella_shared.config import Signals, has_trust_config
from stella_shared.errors import ConfigError, StellaError, TryAgain
from stella_shared.evidence.store import Places, places, trust_identity, trust_key
from stella_signer import submission, trust_config
from stella_signer.fulcio import FulcioKey
from stella_signer.kms import KmsKey
from stella_signer.outside import Frozen, Later, Outside, Refused
from stella_signer.signing import LocalKey, RemoteKey, Signed
from stella_signer.submission import Submitter
from stella_signer.trust_config import Services

_IDLE_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 60.0
_REFRESH_SECONDS: Final = 24 * 3600.0
_STALE_REFRESH_SECONDS: Final = 600.0
#: What a stop leaves for the last chunk's signature and submission.
_FAREWELL_SECONDS: Final = 6.0


class Store(Protocol):
    """What of the chunk store is needed here; calls are made one at a time, in a thread."""

    def next_to_sign(self) -> tuple[int, bytes] | None:
        """Return the first chunk that is not signed, and its statement."""

    def signed(self, index: int, made: Signed) -> None:
        """Keep a signature."""


class Outbound:
    """The signer's way out.  `durable` runs file work alone and until the disk takes it."""

    def __init__(
        self, signals: Signals, log: logging.Logger, durable: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._signals = signals
        self._where = places(signals)
        self._log = log
        self._durable = durable
        self._services: Services | None = None
        self._key: RemoteKey | None = None
        self._submitter: Submitter | None = None
        self._sign_error = self._config_error = ""
        self._told = ""
        self._refresh_seconds = _REFRESH_SECONDS

    @property
    def remote(self) -> bool:
        """Whether signatures are made elsewhere."""
        return self._signals.signing.enabled and self._signals.signing.key_id != "local"

    @property
    def submits(self) -> bool:
        """Whether chunks are submitted to a log."""
        return self._signals.signing.enabled and self._signals.signing.submit_to_rekor

    @asynccontextmanager
    async def working(self, store: Store) -> AsyncIterator[None]:
        """Work beside the block; when it ends, give the last chunk a moment to get out."""
        if not self.remote and not self.submits:
            yield
            return
        async with Outside() as outside, anyio.create_task_group() as tasks:
            tasks.start_soon(self._run, outside, store)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), anyio.move_on_after(_FAREWELL_SECONDS):
                    await self._farewell(store)

    async def _farewell(self, store: Store) -> None:
        """Sign and submit what the stop closed.  What does not get out now does after the next start."""
        try:
            if self._key is not None and not self._sign_error:
                while await self._sign_next(store, self._key):
                    pass
            if self._submitter is not None and not self._submitter.last_error:
                await self._submitter.round()
        except (Later, Refused, Frozen, StellaError, OSError) as e:
            self._tell("warning", "left for the next start", str(e))

    # -- services --------------------------------------------------------------------------------------

    async def _run(self, outside: Outside, store: Store) -> None:
        """Find the services, then sign and submit."""
        if has_trust_config(self._signals.rekor):
            self._services = await self._patiently(self._load_services)
        if self.remote:
            self._key = await self._patiently(functools.partial(self._load_key, outside))
        async with anyio.create_task_group() as tasks:
            if self._key is not None:
                tasks.start_soon(self._signing, store, self._key)
            if self.submits and self._services is not None:
                self._submitter = await self._patiently(
                    functools.partial(self._load_submitter, outside, self._services)
                )
                tasks.start_soon(self._submitting, self._submitter)

    async def _patiently(self, load: Callable[[], Any]) -> Any:
        """Return what `load` gives, in a thread; while it fails say why, and try again."""
        while True:
            try:
                loaded = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)
            except (StellaError, OSError) as e:
                self._config_error = str(e)
                self._tell("error", "signing service not usable", str(e))
                await anyio.sleep(_RETRY_SECONDS / 4)
            else:
                self._config_error = ""
                return loaded

    def _load_services(self) -> Services:
        try:
            services = trust_config.load(self._signals.rekor, self._where.state)
        except TryAgain as e:
            # Its repository is away: what was used last serves until it is back.
            stored = trust_config.load_stored(self._where.state)
            if stored is None:
                raise
            self._refresh_seconds = _STALE_REFRESH_SECONDS
            self._tell("warning", "trust configuration of before is used", str(e))
            return stored
        self._refresh_seconds = _REFRESH_SECONDS
        return services

    def _load_submitter(self, outside: Outside, services: Services) -> Submitter:
        rekor = self._signals.rekor
        return Submitter(
            self._where,
            outside,
            services,
            read_url=rekor.read_url,
            every=rekor.submit_every,
            parallel=rekor.parallel_uploads,
        )

    def _load_key(self, outside: Outside) -> RemoteKey:
        return load_key(self._signals, outside, self._services)

    # -- signing elsewhere -----------------------------------------------------------------------------

    async def _signing(self, store: Store, key: RemoteKey) -> None:
        failures = 0
        while True:
            try:
                more = await self._sign_next(store, key)
            except (Later, Refused, Frozen) as e:
                failures += 1
                self._sign_error = str(e)
                self._tell("warning", "chunk not signed yet", str(e))
                after = e.after_seconds if isinstance(e, Later) else 0.0
                await anyio.sleep(max(after, random.uniform(0.5, min(_RETRY_SECONDS, 2.0**failures))))
                continue
            failures, self._sign_error = 0, ""
            if not more:
                await anyio.sleep(_IDLE_SECONDS)

    async def _sign_next(self, store: Store, key: RemoteKey) -> bool:
        """Sign one chunk; return whether there was one."""
        return await sign_next(self._where, store, key, self._durable)

    # -- submitting ------------------------------------------------------------------------------------

    async def _submitting(self, submitter: Submitter) -> None:
        refreshed = anyio.current_time()
        while True:
            try:
                done = await submitter.round()
            except (StellaError, OSError) as e:
                submitter.last_error = str(e)
                self._tell("warning", "Failed to submit to Rekor", str(e))
                await anyio.sleep(_RETRY_SECONDS)
                continue
            if done.error:
                self._tell("warning", "Failed to submit to Rekor", done.error)
            elif done.rejected:
                self._tell("error", "Failed to submit to Rekor", submitter.last_error)
            elif done.logged:
                submitter.last_error = self._told = ""
            if submitter.needs_new_services or anyio.current_time() - refreshed > self._refresh_seconds:
                refreshed = anyio.current_time()
                await self._refresh(submitter)
            await anyio.sleep(done.after_seconds if done.error else 0.0 if done.left else _IDLE_SECONDS)

    async def _refresh(self, submitter: Submitter) -> None:
        """Read the trust configuration anew: shards are closed, keys are changed, new ones open."""
        try:
            services = await anyio.to_thread.run_sync(self._load_services, abandon_on_cancel=True)
        except (StellaError, OSError) as e:
            self._tell("warning", "trust configuration not refreshed", str(e))
            return
        self._services = services
        submitter.replace_services(services)
        if isinstance(self._key, FulcioKey):
            self._key.replace_services(services)

    def _tell(self, level: str, what: str, reason: str) -> None:
        """Write to the log, once for each new reason."""
        text = f"{what}: {reason}"
        if text != self._told:
            self._told = text
            getattr(self._log, level)(text, extra={"runbook": "issue-rekor-submission-failures"})

    # -- what others see -------------------------------------------------------------------------------

    def reason(self) -> str:
        """Return what is wrong on the way out, "" when nothing is.  The evidence itself is safe meanwhile."""
        submitter = self._submitter
        if submitter is not None and submitter.alarm:
            return submitter.alarm
        if self._config_error or self._sign_error:
            return self._config_error or f"chunks wait for their signature: {self._sign_error}"
        if submitter is not None and submitter.last_error:
            return f"Failed to submit to Rekor: {submitter.last_error}"
        return ""

    def metrics(self) -> dict[str, float]:
        """Return the counters and gauges of submission."""
        submitter = self._submitter
        if submitter is None:
            return {metrics.REKOR_FAILURES: 0}
        return {
            metrics.REKOR_FAILURES: submitter.failures_total,
            metrics.CHUNKS_LOGGED: submitter.logged_total,
            metrics.REKOR_PENDING: submitter.pending,
        }

    def describe(self, local: LocalKey | None) -> dict[str, object]:
        """Return what `stella signer status` shows."""
        signing = self._signals.signing
        found: dict[str, object] = {"mode": "off"}
        if self._key is not None:
            found = dict(self._key.describe())
        elif local is not None:
            found = dict(local.describe())
        elif self.remote:
            found = {"mode": "fulcio" if signing.key_id == "fulcio" else "kms", "waiting_for": self._config_error}
        if self._services is not None:
            found |= trust_config.describe(self._services)
        found["submit_to_rekor"] = signing.submit_to_rekor
        if self._submitter is not None:
            found |= submission.describe(self._submitter)
        found["sign_error"] = self._sign_error
        return found


def load_key(signals: Signals, outside: Outside, services: Services | None) -> RemoteKey:
    """Return the key that is somewhere else, by `signals.signing.key_id`.  Blocks.

    Raises `ConfigError` for what cannot be used, and as `KmsKey.load` does.
    """
    signing, where = signals.signing, places(signals)
    if signing.key_id == "fulcio":
        if services is None:
            raise ConfigError("keyless signing needs a trust configuration under signals.rekor")
        return FulcioKey(outside, services, signing.identity_token_file)
    key = KmsKey.load(signing, where.state)
    trust_key(where, key.public_key)
    return key


async def sign_next(
    where: Places, store: Store, key: RemoteKey, durable: Callable[[Callable[[], Any]], Awaitable[Any]]
) -> bool:
    """Have the first unsigned chunk signed elsewhere and keep the signature; return whether there was one.

    Raises `Later`, `Refused` or `Frozen` when it cannot be signed now; nothing was kept then.
    """
    waiting = await durable(store.next_to_sign)
    if waiting is None:
        return False
    index, payload = waiting
    made = await key.sign(payload)
    if isinstance(key, FulcioKey) and key.identity is not None:
        # Before the envelope: an identity that signed something here is one to be known here.
        await durable(functools.partial(trust_identity, where, key.identity))
    await durable(functools.partial(store.signed, index, made))
    return True
