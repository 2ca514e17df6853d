"""The signer is failed and killed at its system calls, for real: nothing told is lost, and no hand is needed.

`make crash-matrix` takes every call.  Here it is the first of each kind on each kind of file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.signer.crash_matrix import CHANGES, SCENARIOS, Bench, Call, Result, representative, results, tracing_refused


@pytest.fixture(scope="module")
def slice_results() -> list[Result]:
    """Run the representative slice once."""
    if why := tracing_refused():
        pytest.skip(why)
    return results(representative, 2)


def test_every_step_failed_and_killed_is_recovered_from(slice_results: list[Result]) -> None:
    """After each run the next life does the rest: the chain verifies, and what was acknowledged is there once."""
    assert [] == [result for result in slice_results if result.problem]


def test_only_init_gives_up(slice_results: list[Result]) -> None:
    """An error ends the process only while a node is made, with a message and what to do; later it is tried again."""
    ended = [result.call for result in slice_results if result.end == "ended"]
    assert {"life"} == {call.scenario for call in ended}
    made = ("/", "/evidence", "/evidence/keys", "/state", "/state/keys", "/evidence/chain.json", "/state/keys/trusted")
    assert [] == [call for call in ended if not call.role.startswith(made)]
    assert [] == [call for call in ended if "N." in call.role.removeprefix("/evidence/keys/N")]


def test_the_slice_has_every_durable_step(slice_results: list[Result]) -> None:
    """Each file that a signer makes, each system call that makes it durable, each scenario, and each fault."""
    calls = {(result.call.syscall, result.call.role) for result in slice_results}
    for name in ("evidence/N.ledger.json", "evidence/N.dsse.json", "state/head.json", "evidence/N.stamps.json",
                 "evidence/N.sigstore.json", "state/checkpoints.json", "state/rejected.json", "evidence/chain.json",
                 "state/keys/trusted.json", "state/keys/signing.key", "evidence/keys/N.pem"):  # fmt: skip
        assert {("write", f"/{name}.tmp"), ("fdatasync", f"/{name}.tmp"), ("openat", f"/{name}.tmp new")} <= calls
        assert {syscall for syscall, role in calls if role == f"/{name}"} & {"rename", "renameat", "renameat2"}
    for name in ("N.open.ndjson.zst", "N.open.journal"):
        steps = {("openat", " new"), ("write", ""), ("fdatasync", ""), ("ftruncate", "")}
        assert {(syscall, f"/evidence/{name}{suffix}") for syscall, suffix in steps} <= calls
    assert {("fsync", "/evidence"), ("fsync", "/state"), ("flock", "/state/signer.lock")} <= calls
    assert set(SCENARIOS) == {result.call.scenario for result in slice_results}
    assert {"KILL", "EIO", "ENOSPC"} == {result.fault for result in slice_results}
    assert {result.call.syscall for result in slice_results} <= CHANGES


def test_the_matrix_sees_a_loss(tmp_path: Path) -> None:
    """What it looks for it finds: an acknowledged batch that is gone, a line too many, a fault that hit nothing."""
    if why := tracing_refused():
        pytest.skip(why)
    with Bench(tmp_path) as bench, bench.prepared("life") as folder:
        told = bench.live("life", folder)["told"]
        bench.check("life", folder, told, 0)
        with pytest.raises(AssertionError, match="acknowledged batch is gone"):
            bench.check("life", folder, [*told, {"what": "kept", "numbers": [0, 1, 2]}], 0)
        with pytest.raises(AssertionError, match="signed statement is gone"):
            bench.check("life", folder, [*told, {"what": "closed", "statement": "0" * 64}], 0)
        (folder / "evidence" / "000002.ndjson.zst").write_bytes(b"{}\n")
        with pytest.raises(AssertionError, match="edited"):
            bench.check("life", folder, told, 0)
        assert "no call of the folder was failed" in bench.run(Call("life", "write", "", 10_000, "/"), "EIO").problem
