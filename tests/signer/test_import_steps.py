"""Import dies at each durable step: what is at the place is nothing, the old evidence, or the new one, whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from export_maker import FEBRUARY, JANUARY, export_to, months
from faulty_disk import FaultyDisk, Killed

from stella_shared.errors import StellaError
from stella_shared.evidence import importing
from stella_shared.evidence.verify import verify_chain


@pytest.mark.parametrize("joining", [False, True], ids=["fresh", "joining"])
@pytest.mark.parametrize("kill", [True, False], ids=["dies", "fails"])
def test_a_death_or_a_full_disk_at_any_step(tmp_path: Path, joining: bool, kill: bool) -> None:
    """Afterwards it verifies as it is, and the same import again completes it and leaves nothing beside it."""
    node = months(tmp_path / "node")
    first, second = (export_to(node, tmp_path / f"{n}.tar.gz", span) for n, span in enumerate((JANUARY, FEBRUARY)))
    trusted = {node.made.key_id}

    def place(number: int) -> Path:
        target = tmp_path / str(number) / "evidence"
        if joining:
            importing.take_in(first, target, trusted=trusted, disk=FaultyDisk())
        return target

    count = FaultyDisk()
    importing.take_in(second, place(10_000), trusted=trusted, disk=count)
    # Every step that names something, and each third of those that only sync a file.
    for at in [*range(0, count.steps - 8, 3), *range(count.steps - 8, count.steps)]:
        target = place(at)
        disk = FaultyDisk(at, kill=kill, seed=at)
        with pytest.raises(Killed if kill else StellaError):
            importing.take_in(second, target, trusted=trusted, disk=disk)
        if target.exists():
            assert [] == verify_chain(target, trusted_keys=trusted).faults, at
        else:
            assert not joining, at
        importing.take_in(second, target, trusted=trusted, disk=FaultyDisk())
        report = verify_chain(target, trusted_keys=trusted)
        assert ([], 3 if joining else 5, 7) == (report.faults, report.first, report.last), at
        assert ["evidence"] == [p.name for p in target.parent.iterdir()], at
