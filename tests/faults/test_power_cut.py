"""The power goes: what had been synced is there, what had not is not, and the evidence says so.

The file system is a real ext4 in a loop device, shut down without writing its journal: what is in the page cache and
was not synced never reaches it.  What a disk's own cache forgets, and a disk that reorders writes, is not in this.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.disks import mounted
from tests.faults.kit import LONG, Load, lines, make, serving, stopped, until

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

#: Seconds between the last event and the cut.
WHEN = (0.0, 1.0, 4.0, 9.0, 12.0, 35.0) if LONG else (1.0,)


def kill_all(pids: dict[str, int]) -> None:
    """End every process of a node at once, as the power does; the supervisor first, so that it starts none anew."""
    for pid in [pids.pop("supervisor"), *pids.values()]:
        os.kill(pid, signal.SIGKILL)
    for pid in pids.values():
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "a killed process is gone")  # type: ignore[misc]


@pytest.mark.parametrize("seconds", WHEN)
def test_the_power_is_cut(tmp_path: Path, seconds: float) -> None:
    """Every line that was durable is there and verifies; the rest is marked as not known; then all goes on.

    The signer hangs meanwhile, so that there is a backlog on the bus: of that the server's last sync decides.
    """
    with mounted(tmp_path / "image", tmp_path / "disk", 1 << 30) as disk:
        node = make(tmp_path, "cut", data=disk.at)
        with serving(node):
            durable = Load(node, tmp_path / "work-1", 10_000, 10_000)
            durable.end()
            until(lambda: lines(node) == durable.made, "every line is durable", node=node)
            with stopped(node.pids()["signer"]):
                backlog = Load(node, tmp_path / "work-2", 20_000, 20_000)
                backlog.end()
                time.sleep(seconds)
                pids = node.pids()
                disk.cut_power()
                kill_all(pids)
            disk.restore_power()
            # What is pinned is in the kernel's memory, and ends with it.
            node.stella("detach", "--pins", check=False)
            node.stella("start", "--detach")
            after = Load(node, tmp_path / "work-3", 5_000, 5_000)
            after.end()
            node.stop()
        report = node.verify()
        assert report.valid, report
        assert [durable.made, after.made] == [durable.recorded(node), after.recorded(node)]
        print(f"cut after {seconds:g} s: {backlog.recorded(node)} of {backlog.made} of the backlog are in the evidence")
        ends = {run["run"]: run["unclean"] for ledger in node.ledgers() for run in ledger["runs"]}
        assert [True, False] == [bool(unclean) for unclean in ends.values()], ends
        assert {"unclean"} == {warning.code for warning in report.warnings}
