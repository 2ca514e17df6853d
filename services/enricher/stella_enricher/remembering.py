"""A memory with a bound in bytes that forgets what is not used.

Two dicts: an entry that is used moves to the young one, and what is still in the old one when they change
places is forgotten.  They change places after half the time to live, and when the young one is full.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

#: What a dict takes for an entry, at the worst just before and after it has grown, and the key when it is a number.
SLOT_BYTES: Final = 120


class Memory(Generic[K, V]):
    """`size_of` says what an entry takes, its slot excepted; `clock` is in seconds."""

    def __init__(
        self,
        size_of: Callable[[K, V], int],
        *,
        max_bytes: int,
        ttl_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._size_of = size_of
        self._clock = clock
        self._half_life_seconds = ttl_seconds / 2
        self._rotate_at = clock() + self._half_life_seconds
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._young_bytes = self._old_bytes = 0
        self.max_bytes = max_bytes
        self.hits = self.misses = self.pushed_out = 0

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    @property
    def bytes(self) -> int:
        """What its entries take, each reckoned as if it shared nothing with another."""
        return self._young_bytes + self._old_bytes

    def get(self, key: K) -> V | None:
        """Return what is remembered, and keep it for another while; None when nothing is."""
        value = self.keep(key)
        if value is None:
            self.misses += 1
        else:
            self.hits += 1
        return value

    def keep(self, key: K) -> V | None:
        """Return what is remembered, and keep it for another while, without counting it."""
        value = self._young.get(key)
        if value is None and (value := self._old.get(key)) is not None:
            self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Remember `value`."""
        size = self._size_of(key, value) + SLOT_BYTES
        self.drop(key)
        if self._young_bytes + size > self.max_bytes // 2 and self._young:
            self.pushed_out += len(self._old)
            self._rotate()
        self._young[key] = value
        self._young_bytes += size

    def drop(self, key: K) -> None:
        """Forget `key`."""
        value = self._young.pop(key, None)
        if value is not None:
            self._young_bytes -= self._size_of(key, value) + SLOT_BYTES
        value = self._old.pop(key, None)
        if value is not None:
            self._old_bytes -= self._size_of(key, value) + SLOT_BYTES

    def clear(self) -> None:
        """Forget everything."""
        self._young, self._old = {}, {}
        self._young_bytes = self._old_bytes = 0

    def tick(self) -> None:
        """Forget what was not used for its time.  To be called now and then."""
        if self._clock() >= self._rotate_at:
            self._rotate()

    def stats(self) -> dict[str, float]:
        """Return sizes and counts, for the heartbeat."""
        return {
            "entries": len(self),
            "bytes": self.bytes,
            "max_bytes": self.max_bytes,
            "hits": self.hits,
            "misses": self.misses,
            "pushed_out": self.pushed_out,
        }

    def _rotate(self) -> None:
        self._old, self._young = self._young, {}
        self._old_bytes, self._young_bytes = self._young_bytes, 0
        self._rotate_at = self._clock() + self._half_life_seconds


def text_bytes(*texts: str) -> int:
    """Return what strings take."""
    return sum(sys.getsizeof(text) for text in texts if text)
