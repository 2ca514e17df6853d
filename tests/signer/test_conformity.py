"""What the signer writes is accepted by implementations that nobody here wrote, and refused once tampered with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from tests.signer.log_kit import Queue, surroundings
from tests.sigstore.peers import Check, judge_js, key_hints

from stella_shared.evidence import canonical, keys, names
from stella_shared.evidence.transparency import proof_of_log

pytestmark = pytest.mark.anyio
BOTH = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])


@BOTH
async def test_another_implementation_accepts_every_bundle(tmp_path: Path, version: int) -> None:
    """`@sigstore/verify` takes each bundle with the trusted root and the node's key, log entry and time included."""
    with surroundings(version, tsas=2) as around:
        queue = Queue(tmp_path, around)
        around.log.grow(300, api=version)
        await queue.round()
        root, _ = around.documents()
        hints = key_hints(keys.public_pem(queue.node.key._key.public_key()))
        checks = [Check(json.loads(queue.bundle(i)), hints, timestamps=2) for i in queue.logged()]
        verdicts = await anyio.to_thread.run_sync(lambda: judge_js(root, checks))
        assert [(True, "")] * 4 == [tuple(v) for v in verdicts]


def _mutations(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield (place, other value) for every leaf of a JSON document, and every list without one of its items."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _mutations(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield (*path, i), _REMOVE
            yield from _mutations(item, (*path, i))
    elif isinstance(value, str):
        for at in {0, len(value) // 2, max(0, len(value) - 3)}:
            other = "B" if value[at : at + 1] != "B" else "C"
            yield path, (str(int(value) + 1) if value.isdigit() else value[:at] + other + value[at + 1 :])


_REMOVE = object()


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(document))
    place = changed
    for step in path[:-1]:
        place = place[step]
    if value is _REMOVE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


@BOTH
async def test_every_tampered_bundle_is_refused(tmp_path: Path, version: int) -> None:
    """Each single value changed, each list cut: our verifier refuses all of them.

    A timestamp's bytes outside of what its authority signed (such as its status text) are the only ones that
    nobody vouches for; here they are changed in the signed part.
    """
    with surroundings(version) as around:
        queue = Queue(tmp_path, around)
        around.log.grow(5, api=version)
        await queue.round()
        good = json.loads(queue.bundle(2))
        envelope = queue.node.file(2, names.ENVELOPE).read_bytes()
        verifier = proof_of_log.verifier_of(queue.node.key._key.public_key(), None)
        root = around.services().root
        proof_of_log.check(canonical.dumps(good), envelope, verifier, root)
        tried = accepted = 0
        for path, value in _mutations(good):
            if value is _REMOVE and "rfc3161Timestamps" in path:
                continue  # with a promise of the log, or without a time, it is another good bundle
            tried += 1
            try:
                proof = proof_of_log.check(canonical.dumps(_with(good, path, value)), envelope, verifier, root)
            except ValueError:
                continue
            # A timestamp of somebody unknown is no trusted time.
            accepted += not ("signedTimestamp" in path and proof.unknown_times)
        assert tried > 40 and accepted == 0
