"""The containers that the selectors of a configuration match now: of its targets, and of watched functions' images.

A container stays until its runtime says that it is no more, or leaves it out of its list.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import anyio
import msgspec

from stella_enricher.runtimes.facts import Facts
from stella_shared.selectors import MAX_CONTAINERS, Selector


class _Chosen(msgspec.Struct, frozen=True):
    """A container that matches: who told of it, when, and which selectors it matches."""

    teller: str
    at: float
    selected: tuple[str, ...]


class Selection:
    """Matches containers with selectors.  `version` grows with every change of the sets, and `changed` is set then."""

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self._selectors = selectors
        self._chosen: dict[str, _Chosen] = {}
        self.version = 0
        self.changed = anyio.Event()
        self.truncated = False

    @property
    def wanted(self) -> bool:
        """Whether there are selectors at all."""
        return bool(self._selectors)

    def matches(self, facts: Facts) -> tuple[str, ...]:
        """Return the selectors that a container matches."""
        return tuple(s.text for s in self._selectors if any(s.pattern.fullmatch(t) for t in _texts(s, facts)))

    def consider(self, teller: str, container_id: str, selected: tuple[str, ...], at: float) -> None:
        """Take a container in when it matches, and out when it does no more."""
        known = self._chosen.get(container_id)
        if not selected:
            self.gone(container_id)
        elif known is None and len(self._chosen) >= MAX_CONTAINERS:
            self.truncated = True
        else:
            self._chosen[container_id] = _Chosen(teller, at, selected)
            if known is None or known.selected != selected:
                self._has_changed()

    def gone(self, container_id: str) -> None:
        """Take a container out."""
        if self._chosen.pop(container_id, None) is not None:
            self.truncated = False
            self._has_changed()

    def keep(self, teller: str, container_ids: Collection[str], begun: float) -> None:
        """Take out what `teller` told of before `begun` and does not list any more."""
        for container_id, chosen in list(self._chosen.items()):
            if chosen.teller == teller and chosen.at < begun and container_id not in container_ids:
                self.gone(container_id)

    def sets(self) -> dict[str, list[str]]:
        """Return each selector with the ids of the containers that match it."""
        sets: dict[str, list[str]] = {s.text: [] for s in self._selectors}
        for container_id, chosen in sorted(self._chosen.items()):
            for text in chosen.selected:
                sets[text].append(container_id)
        left = MAX_CONTAINERS
        for ids in sets.values():  # the targets' selectors come first
            self.truncated |= len(ids) > left
            del ids[left:]
            left -= len(ids)
        return sets

    def _has_changed(self) -> None:
        self.version += 1
        self.changed.set()
        self.changed = anyio.Event()


def _texts(selector: Selector, facts: Facts) -> list[str]:
    if selector.kind == "name":
        pod = (facts.pod.name, facts.pod.container) if facts.pod is not None else ()
        return [name for name in (facts.name, *pod) if name]
    if selector.kind == "image":
        return [facts.image] if facts.image else []
    return [value for key, value in facts.labels if key == selector.key]
