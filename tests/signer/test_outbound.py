"""The way out never holds up the evidence, and its troubles never end the signer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from chain_maker import small_chain
from tests.signer.log_kit import surroundings

from stella_shared import config
from stella_shared.errors import NotPermitted
from stella_shared.evidence.store import places
from stella_signer import outbound
from stella_signer.outbound import Outbound
from stella_signer.outside import Frozen, Later, Refused
from stella_signer.signing import Signed

pytestmark = pytest.mark.anyio


async def durable(work: Callable[[], Any]) -> Any:
    return work()


class Waiting:
    """A store in which a chunk waits from a certain moment on."""

    def __init__(self) -> None:
        self.waiting: tuple[int, bytes] | None = None

    def next_to_sign(self) -> tuple[int, bytes] | None:
        return self.waiting

    def signed(self, index: int, made: Signed) -> None:
        raise AssertionError("nothing was signed")


class Away:
    """A key that cannot be reached."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def sign(self, payload: bytes) -> Signed:
        raise self._error

    def describe(self) -> dict[str, str]:
        return {"mode": "away"}


@pytest.mark.parametrize(
    "error",
    [Later("connection refused"), Refused("HTTP 403"), Frozen("HTTP 405"), NotPermitted("no"), OSError(5, "EIO")],
    ids=lambda error: type(error).__name__,
)
async def test_a_stop_does_not_fail_with_a_service_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The last chunk's signature is tried once more; when the service is away by then, it waits for the next start."""
    signals = config.load(None, {}, {"output_directory": str(tmp_path / "evidence"), "signing.key_id": "file:/none"})
    monkeypatch.setattr(Outbound, "_load_key", lambda self, outside: Away(error))
    monkeypatch.setattr(outbound, "_IDLE_SECONDS", 60.0)
    out, store = Outbound(signals, logging.getLogger("test"), durable), Waiting()
    with anyio.fail_after(10):
        async with out.working(store):
            while out.describe(None).get("mode") != "away":
                await anyio.sleep(0.01)
            await anyio.sleep(0.05)
            store.waiting = (1, b"{}")
    assert "left for the next start" in caplog.text


async def test_a_damaged_memory_of_checkpoints_is_told_and_the_signer_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`checkpoints.json` is for people to look at; meanwhile the evidence is written, and nothing is submitted."""
    node = small_chain(tmp_path)
    (node.where.state / "checkpoints.json").write_bytes(b"{")
    with surroundings(2) as around:
        signals = config.load(
            None,
            {},
            {
                "output_directory": str(node.evidence),
                "signing.submit_to_rekor": "true",
                "rekor.trust_config": str(around.write(tmp_path)),
            },
        )
        assert places(signals) == node.where
        out = Outbound(signals, logging.getLogger("test"), durable)
        with anyio.fail_after(10):
            async with out.working(Waiting()):
                while not out.reason():
                    await anyio.sleep(0.01)
        assert "checkpoints.json" in out.reason() and around.log.requests["v2.submit"] == 0


def test_a_failure_is_told_once_for_each_reason_with_its_runbook_section(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`Failed to submit to Rekor: …`: not again every few seconds, and the section stands beside it."""
    out = Outbound(config.load(None, {}), logging.getLogger("test"), lambda: None)
    with caplog.at_level(logging.WARNING):
        for reason in ("connection refused", "connection refused", "time-out"):
            out._tell("warning", "Failed to submit to Rekor", reason)
    assert [
        ("Failed to submit to Rekor: connection refused", "issue-rekor-submission-failures"),
        ("Failed to submit to Rekor: time-out", "issue-rekor-submission-failures"),
    ] == [(record.getMessage(), vars(record)["runbook"]) for record in caplog.records]
