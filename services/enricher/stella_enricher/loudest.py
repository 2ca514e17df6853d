"""Which containers have the most lines: counted by cgroup, told once a second, by name.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from stella_enricher.containers import Container

TOLD_MAX: Final = 20
#: Cgroups that are counted between two beats; the lines of any others count as `others`.
COUNTED_MAX: Final = 4096
HOST_NAME: Final = "host"
OTHERS: Final = "others"


class Loudest:
    """Lines by container since the last time they were told."""

    def __init__(self, now: float) -> None:
        self._lines: dict[str, int] = {}
        self._images: dict[str, str] = {}
        self._since = now

    def add(self, by_cgroup: Mapping[int, int], container_of: Callable[[int], Container]) -> None:
        """Count the lines of one batch."""
        for cgroup, lines in by_cgroup.items():
            container = container_of(cgroup)
            name = container.container_id or HOST_NAME
            if name not in self._lines and len(self._lines) >= COUNTED_MAX:
                name = OTHERS
            self._lines[name] = self._lines.get(name, 0) + lines
            if container.image_name:
                self._images[name] = container.image_name

    def tell(self, now: float) -> list[dict[str, object]]:
        """Return the loudest with their lines per second, most first, and begin anew."""
        seconds = max(now - self._since, 1e-3)
        ranked = sorted(self._lines.items(), key=lambda item: (-item[1], item[0]))[:TOLD_MAX]
        told: list[dict[str, object]] = [
            {"container": name, "image": self._images.get(name, ""), "lines_per_second": round(lines / seconds, 1)}
            for name, lines in ranked
        ]
        self._lines.clear()
        self._images.clear()
        self._since = now
        return told
