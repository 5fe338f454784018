"""A store of byte strings under a limit that lets the least worth go: GreedyDual-Size-Frequency.

An entry's worth is L + uses x cost / size, where L is the worth of the last one that had to go:
what is not used again is overtaken, however dear it was (Cherkasova 1998, after Cao and Irani).
"""

import heapq
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

ENTRY_BYTES = 512
"""Counted for each entry beside its content: key, books, heap."""


@dataclass(slots=True)
class _Entry:
    content: bytes
    cost: float
    uses: int
    worth: float
    number: int
    """Of the heap's item that is true."""


class GreedyDual(Generic[K]):
    """Owner of the entries. `used_bytes` is never above `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.evictions = 0
        self._entries: dict[K, _Entry] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._level = 0.0
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def get(self, key: K) -> bytes | None:
        """Return an entry's content and count the use; None for one that is not there."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.uses += 1
        self._value(key, entry)
        return entry.content

    def worth(self, key: K) -> float:
        """Return what an entry is worth now; KeyError for one that is not there."""
        return self._entries[key].worth

    def put(self, key: K, content: bytes, cost: float) -> bool:
        """Keep an entry, in place of one with its key; False when it alone is over the limit.

        `cost`: of having it anew, in any one unit. Those of least worth go to make room; the new
        one is not spared, if it is worth the least.
        """
        self.discard(key)
        if _size(content) > self.limit_bytes:
            return False
        entry = _Entry(content, cost, 1, 0.0, 0)
        self._entries[key] = entry
        self.used_bytes += _size(content)
        self._value(key, entry)
        self._shrink()
        return key in self._entries

    def discard(self, key: K) -> None:
        """Drop an entry if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= _size(entry.content)

    def discard_where(self, is_stale: Callable[[K], bool]) -> int:
        """Drop every entry whose key is stale and return how many."""
        stale = [key for key in self._entries if is_stale(key)]
        for key in stale:
            self.discard(key)
        return len(stale)

    def set_limit(self, limit_bytes: int) -> None:
        """Keep to another limit from now on."""
        self.limit_bytes = limit_bytes
        self._shrink()

    def check(self) -> None:
        """Assert the invariant: the bytes are those of the entries and within the limit."""
        assert self.used_bytes == sum(_size(each.content) for each in self._entries.values())
        assert self.used_bytes <= self.limit_bytes
        live = {(number, key) for _, number, key in self._heap}
        assert all((each.number, key) in live for key, each in self._entries.items())

    def _value(self, key: K, entry: _Entry) -> None:
        entry.worth = self._level + entry.uses * entry.cost / _size(entry.content)
        self._count += 1
        entry.number = self._count
        heapq.heappush(self._heap, (entry.worth, entry.number, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(each.worth, each.number, k) for k, each in self._entries.items()]
            heapq.heapify(self._heap)

    def _shrink(self) -> None:
        while self.used_bytes > self.limit_bytes:
            worth, number, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.number == number:
                self._level = worth
                self.evictions += 1
                self.discard(key)


def _size(content: bytes) -> int:
    return len(content) + ENTRY_BYTES
