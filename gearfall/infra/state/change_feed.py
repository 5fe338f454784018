"""What changed in cluster state, record by record, for one follower that keeps an index of its own.

Changes of one record that were not taken are merged into the last one, so that a follower which
falls behind holds at most every record once.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gearfall.infra.state.cluster_keys import Record
from gearfall.infra.state.cluster_view import ClusterView


@dataclass(frozen=True, slots=True)
class Change:
    """One record as it is now."""

    kind: str
    record_id: Any
    """A string, or a pair for kinds with two id fields."""
    record: Record | None
    """None: it is gone, and may never have been seen by who asks."""


@dataclass(frozen=True, slots=True)
class Changes:
    """All that changed since the last item."""

    restart: ClusterView | None
    """Forget everything and begin from this view; `records` came after it."""
    records: tuple[Change, ...]
    revision: int
    """Of cluster state after all of them."""


class ChangeFeed:
    """One follower's changes. `take` never waits; `wait` returns when there is something."""

    def __init__(self, view: ClusterView) -> None:
        """Begins with a restart from `view`."""
        self._restart: ClusterView | None = view
        self._changed: dict[tuple[str, Any], Change] = {}
        self._revision = view.revision
        self._event = asyncio.Event()
        self._event.set()

    def take(self) -> Changes:
        """Return what came since the last call, and forget it."""
        taken = Changes(self._restart, tuple(self._changed.values()), self._revision)
        self._restart = None
        self._changed = {}
        self._event.clear()
        return taken

    async def wait(self) -> None:
        """Return when something changed that was not taken, or the cluster stopped following."""
        await self._event.wait()

    def restart(self, view: ClusterView) -> None:
        """State was listed anew."""
        self._restart = view
        self._changed = {}
        self._revision = view.revision
        self._event.set()

    def add(self, changes: Iterable[Change], revision: int) -> None:
        """Note changes in the order in which they happened."""
        self._revision = revision
        for change in changes:
            self._changed[change.kind, change.record_id] = change
            self._event.set()

    def wake(self) -> None:
        """Have `wait` return though nothing changed."""
        self._event.set()
