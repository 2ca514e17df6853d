"""What the signer's process does for a command and then ends: it needs the key and the store, and no bus."""

from __future__ import annotations

import time

import anyio
import anyio.to_thread

from stella_shared import VERSION, clock, config
from stella_shared.config import Signals
from stella_shared.errors import ConfigError, TryAgain
from stella_shared.evidence import export, manifest
from stella_shared.evidence.export import Times
from stella_shared.evidence.store import places
from stella_signer import outbound, trust_config
from stella_signer.chunks import ChunkStore
from stella_signer.outside import Frozen, Later, Outside, Refused
from stella_signer.signing import LocalKey


def record_notes(signals: Signals) -> None:
    """Take the store over, finish what an earlier life began, and record the notes that wait, signed.

    Raises as `ChunkStore.open` does, and `TryAgain` when the open chunk cannot be closed because a batch in it
    waits for one that is still on the bus, when a key elsewhere does not sign, or when the disk refuses.
    """
    where = places(signals)
    remote = signals.signing.enabled and signals.signing.key_id != "local"
    key = LocalKey.load(where.state) if signals.signing.enabled and not remote else None
    try:
        store = ChunkStore.open(where, key, version=VERSION, now=lambda: clock.utc_text(time.time_ns()), remote=remote)
        try:
            while store.waiting_notes():
                if store.account.early():
                    raise TryAgain(
                        f"chunk {store.index} waits for batches that are on the bus",
                        hint="start the node, and give the command again while it runs",
                    )
                store.close("note")
            if remote:
                anyio.run(_sign_elsewhere, signals, store)
        finally:
            store.release()
    except OSError as e:
        raise TryAgain(f"{e.filename or where.evidence}: {e.strerror}", hint="see whether the disk is full") from None


async def _sign_elsewhere(signals: Signals, store: ChunkStore) -> None:
    """Have every closed chunk signed by the key that is somewhere else."""
    async with Outside() as outside:
        services = None
        if config.has_trust_config(signals.rekor):
            services = trust_config.load(signals.rekor, places(signals).state)
        key = outbound.load_key(signals, outside, services)
        try:
            while await outbound.sign_next(places(signals), store, key, anyio.to_thread.run_sync):
                pass
        except (Later, Refused, Frozen) as e:
            raise TryAgain(
                f"the chunk is closed and not signed yet: {e}", hint="the signer signs it as soon as its key answers"
            ) from None


def sign_manifest(signals: Signals, asked: Times, *, proofs: bool) -> bytes:
    """Return the signed manifest of an export: it is made here from the evidence, so nothing else gets signed.

    Raises as `export.build` does, `UsageError` for times of another form, `ConfigError` for keyless signing, and
    `TryAgain` when a key elsewhere does not sign.
    """
    export.check_times(asked)
    where = places(signals)
    payload = manifest.encode(export.build(where, asked, proofs=proofs))
    if signals.signing.key_id == "local":
        return LocalKey.load(where.state).repeatable_envelope(payload)
    if signals.signing.key_id == "fulcio":
        raise ConfigError(
            "an export is signed with a lasting key, and this node signs keyless",
            hint="archive the whole directory instead: tar -czf evidence.tar.gz -C … evidence; verify-chain takes it",
        )
    return anyio.run(_signed_elsewhere, signals, payload)


async def _signed_elsewhere(signals: Signals, payload: bytes) -> bytes:
    async with Outside() as outside:
        try:
            return (await outbound.load_key(signals, outside, None).sign(payload)).envelope
        except (Later, Refused, Frozen) as e:
            raise TryAgain(str(e), hint="is the key's service reachable?") from None
