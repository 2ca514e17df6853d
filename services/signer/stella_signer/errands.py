"""What the signer's process does for a command and then ends: it needs the key and the store, and no bus."""

from __future__ import annotations

import time

from stella_shared import VERSION, clock
from stella_shared.config import Signals
from stella_shared.errors import TryAgain
from stella_shared.evidence import export, manifest
from stella_shared.evidence.export import Times
from stella_shared.evidence.store import places
from stella_signer.chunks import ChunkStore
from stella_signer.signing import LocalKey


def record_notes(signals: Signals) -> None:
    """Take the store over, finish what an earlier life began, and record the notes that wait, signed.

    Raises as `ChunkStore.open` does, and `TryAgain` when the open chunk cannot be closed because a batch in it
    waits for one that is still on the bus, or when the disk refuses.
    """
    where = places(signals)
    key = LocalKey.load(where.state) if signals.signing.enabled else None
    try:
        store = ChunkStore.open(where, key, version=VERSION, now=lambda: clock.utc_text(time.time_ns()))
        try:
            while store.waiting_notes():
                if store.account.early():
                    raise TryAgain(
                        f"chunk {store.index} waits for batches that are on the bus",
                        hint="start the node, and give the command again while it runs",
                    )
                store.close("note")
        finally:
            store.release()
    except OSError as e:
        raise TryAgain(f"{e.filename or where.evidence}: {e.strerror}", hint="see whether the disk is full") from None


def sign_manifest(signals: Signals, asked: Times, *, proofs: bool) -> bytes:
    """Return the signed manifest of an export: it is made here from the evidence, so nothing else gets signed.

    Raises as `export.build` does, and `UsageError` for times of another form.
    """
    export.check_times(asked)
    where = places(signals)
    key = LocalKey.load(where.state)
    return key.repeatable_envelope(manifest.encode(export.build(where, asked, proofs=proofs)))
