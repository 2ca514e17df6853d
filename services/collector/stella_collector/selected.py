"""Which containers the selectors match, as the enrichers of this node say on the bus: of targets, and of the images
of watched functions.

A set is repeated every second.  The union of the sets that were heard lately counts.  When nobody speaks, or
nobody knows all, the last known sets stay: a target that goes on running is not to be lost because an enricher
restarts, or a runtime hangs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Final

import anyio
import msgspec

from stella_shared import selectors, subjects
from stella_shared.bus import Bus
from stella_shared.config import Signals, node_name, selector_texts
from stella_shared.errors import BrokenPromise
from stella_shared.selectors import TargetSet

log = logging.getLogger(__name__)

#: Enrichers that are listened to at the same time.
MAX_INSTANCES: Final = 64


class _Heard(msgspec.Struct, frozen=True):
    """An enricher's last set, and when it came."""

    at: float
    targets: TargetSet


class Selected:
    """The containers of each selector.  `changed` is set, and replaced, when they change."""

    def __init__(self, signals: Signals, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._node = node_name(signals)
        self._clock = clock
        self._heard: dict[str, _Heard] = {}
        self._containers: dict[str, list[str]] = {}
        self._targets: list[str] = []
        self._globs: set[str] = set()
        self.changed = anyio.Event()
        self.ask(signals)

    def ask(self, signals: Signals) -> None:
        """Take up a configuration; containers of selectors that it has kept stay."""
        self._targets = [text for text in signals.filters.target_containers if selectors.is_selector(text)]
        self._globs = {entry.image for entry in signals.probes.functions if entry.image}
        self._containers = {text: self._containers.get(text, []) for text in selector_texts(signals)}

    def known(self) -> dict[str, list[str]]:
        """Return each selector with the ids of its containers."""
        return self._containers

    def go_on(self, known: dict[str, list[str]]) -> None:
        """Begin with what a former collector knew, until an enricher speaks."""
        self._containers.update({text: known[text] for text in self._containers if text in known})

    @property
    def wanted(self) -> bool:
        """Whether there are selectors at all."""
        return bool(self._containers)

    @property
    def heard(self) -> bool:
        """Whether anybody has said yet what they match."""
        return bool(self._heard)

    @property
    def truncated(self) -> bool:
        """Whether more containers match than are told."""
        return any(heard.targets.truncated for heard in self._heard.values())

    def containers(self) -> dict[str, list[str]]:
        """Return each selector of targets with the ids of its containers."""
        return {text: self._containers[text] for text in self._targets}

    def images(self) -> dict[str, frozenset[str]]:
        """Return each `image` of watched functions with the ids of its containers."""
        return {glob: frozenset(self._containers[selectors.of_image(glob)]) for glob in self._globs}

    def hear(self, data: bytes) -> None:
        """Take a set from the bus.  Raises `BrokenPromise` for what is none of this node's."""
        targets = selectors.decode_target_set(data)
        if targets.node != self._node:
            raise BrokenPromise(f"a set of targets of node {targets.node[:253]!r}")
        now = self._clock()
        # Who is silent gives way to who speaks; the last one to speak stays.
        self._heard = {i: h for i, h in self._heard.items() if now - h.at < selectors.STALE_SECONDS}
        if targets.instance in self._heard or len(self._heard) < MAX_INSTANCES:
            self._heard[targets.instance] = _Heard(now, targets)
        found = {text: sorted(self._union(text)) for text in self._containers}
        if found != self._containers:
            self._containers = found
            self.changed.set()
            self.changed = anyio.Event()

    async def listen(self, bus: Bus) -> None:
        """Take sets as they come, until cancelled."""
        async with aclosing(bus.tail(subjects.targets(self._node))) as messages:
            async for message in messages:
                try:
                    self.hear(message.data)
                except BrokenPromise as e:
                    log.warning("a message on %s is passed over: %s", message.subject, e)

    def _union(self, text: str) -> set[str]:
        nobody_knows_all = all(heard.targets.partial for heard in self._heard.values())
        ids = set(self._containers[text]) if nobody_knows_all else set()
        for heard in self._heard.values():
            ids.update(heard.targets.selectors.get(text, []))
        return set(sorted(ids)[: selectors.MAX_CONTAINERS])
