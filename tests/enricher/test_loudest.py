"""The containers with the most lines, by name and second."""

from __future__ import annotations

from stella_enricher.containers import HOST, Container, unknown
from stella_enricher.loudest import COUNTED_MAX, OTHERS, TOLD_MAX, Loudest

WEB = Container("docker://" + "ab" * 32, image_name="web:1")


def test_lines_are_told_per_second_most_first_and_begin_anew() -> None:
    """Two cgroups of one container are one; the host is one; after they were told the count begins again."""
    loudest = Loudest(10.0)
    known = {1: HOST, 2: WEB, 3: WEB, 4: unknown(4, "build_step")}
    loudest.add({1: 10, 2: 30, 3: 10}, known.__getitem__)
    loudest.add({2: 10, 4: 5}, known.__getitem__)
    assert [
        {"container": WEB.container_id, "image": "web:1", "lines_per_second": 25.0},
        {"container": "host", "image": "", "lines_per_second": 5.0},
        {"container": "unknown:4", "image": "", "lines_per_second": 2.5},
    ] == loudest.tell(12.0)
    assert [] == loudest.tell(13.0)


def test_a_flood_of_containers_is_bounded() -> None:
    """Beyond what is counted by name there is one sum; of the rest the loudest are told."""
    loudest = Loudest(0.0)
    loudest.add({n: 1 for n in range(COUNTED_MAX + 500)}, lambda n: unknown(n, "build_step"))
    told = loudest.tell(1.0)
    assert TOLD_MAX == len(told)
    assert {"container": OTHERS, "image": "", "lines_per_second": 500.0} == told[0]
