"""Ports to cluster state and the job queue: real adapters and fakes pass one suite."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.generation.job import Job
from gearfall.core.ids import ModelName


@dataclass(frozen=True, slots=True)
class Fence:
    """Proof of leadership: a write fails unless `key` still has `create_revision`."""

    key: str
    create_revision: int


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One key as cluster state holds it. Keys are relative, without the adapter's prefix."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All entries below a prefix at one revision. In a watch: forget all else, start here."""

    entries: tuple[StateEntry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class KeyPut:
    """A key was created or changed."""

    entry: StateEntry


@dataclass(frozen=True, slots=True)
class KeyDeleted:
    """A key was deleted, or its lease ended."""

    key: str
    mod_revision: int


WatchItem = Snapshot | KeyPut | KeyDeleted


class Lease(Protocol):
    """A lease that is kept alive until it is revoked or lost."""

    @property
    def lease_id(self) -> int:
        """The server's number of this lease."""
        ...

    @property
    def is_lost(self) -> bool:
        """True once it can no longer be counted on (expired, or state unreachable past its TTL)."""
        ...

    async def wait_lost(self) -> None:
        """Return when the lease is lost."""
        ...

    async def revoke(self) -> None:
        """End it now; its keys are deleted. Idempotent."""
        ...


class ClusterState(Protocol):
    """A linearizable key-value store with leases, watches and fenced writes (etcd).

    Every call raises Unavailable when the state can't be reached within its deadline.
    """

    async def get(self, key: str) -> StateEntry | None:
        """Return the entry, or None where there is none."""
        ...

    async def list(self, prefix: str) -> Snapshot:
        """Return all entries below `prefix` at one revision."""
        ...

    async def put(
        self, key: str, value: bytes, *, lease: Lease | None = None, fence: Fence | None = None
    ) -> int:
        """Write and return the revision. Raises Conflict when the fence no longer holds."""
        ...

    async def compare_and_set(
        self,
        key: str,
        value: bytes,
        *,
        expected_mod_revision: int,
        lease: Lease | None = None,
        fence: Fence | None = None,
    ) -> int:
        """Write if the key is at `expected_mod_revision` (0: absent). Raises Conflict if not."""
        ...

    async def delete(self, key: str, *, fence: Fence | None = None) -> int:
        """Delete and return the revision, 0 when it was not there.

        Raises Conflict when the fence no longer holds.
        """
        ...

    async def grant_lease(self, ttl_s: float) -> Lease:
        """Grant a lease and keep it alive in the background."""
        ...

    def watch(self, prefix: str) -> AsyncIterator[WatchItem]:
        """Yield a Snapshot, then every change in order, for ever.

        Survives server restarts (resumes at the next revision) and compaction (yields a fresh
        Snapshot): nothing is missed in silence. Ends only when the iterator is closed.
        """
        ...

    async def close(self) -> None:
        """Close connections; leases that were not revoked run out."""
        ...


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A claimed queue entry: acknowledge it by `entry_id` after the effect."""

    entry_id: str
    job: Job
    deliveries: int
    """How often it was handed out, this time included."""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """Entries of one model's queue."""

    waiting: int
    """Appended, not claimed."""
    claimed: int
    """Claimed, not acknowledged."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How far a model's queue has come, as one moment shows it."""

    appended: int
    """Entries ever appended, in both classes; begins anew when the queue server lost its data."""
    waiting: int
    """Appended, not claimed."""
    newest: tuple[str, ...]
    """Names the newest entry of each class."""


class JobQueue(Protocol):
    """One queue of jobs per model with consumer groups (Redis Streams). At-least-once delivery.

    Every call raises Unavailable when the queue server can't be reached.
    """

    @property
    def restarts(self) -> int:
        """How often the server was seen to have come back, and maybe forgotten its last moments.

        Entries that were acknowledged then can be there again, held by whoever had them; `reclaim`
        hands them out anew.
        """
        ...

    async def append(self, job: Job) -> str:
        """Append to the queue of `job.model` and return the entry's id.

        Raises Overloaded when the server has no room for it, and Unavailable.
        """
        ...

    async def claim(
        self,
        model: ModelName,
        consumer: str,
        *,
        max_jobs: int,
        block_s: float,
        max_batch_jobs: int | None = None,
    ) -> Sequence[QueuedJob]:
        """Take up to `max_jobs` entries, interactive jobs before batch jobs, each class in order.

        Waits up to `block_s` for the first. Of batch jobs it takes up to `max_batch_jobs`, none for
        0. Where both classes get a job in the moment that ends the wait, one entry may be too many.
        A malformed entry is acknowledged, logged and left out: one bad entry never blocks a queue.
        """
        ...

    async def peek(self, model: ModelName, *, max_jobs: int) -> Sequence[Job]:
        """Return the jobs that the next claim would get. They stay where they are, nobody's.

        A malformed entry is left out.
        """
        ...

    async def acknowledge(self, model: ModelName, entry_ids: Sequence[str]) -> None:
        """Remove claimed entries for good, after their effect. Idempotent."""
        ...

    async def reclaim(
        self, model: ModelName, consumer: str, *, alive: frozenset[str], max_jobs: int
    ) -> Sequence[QueuedJob]:
        """Take over entries claimed by consumers that are not in `alive`.

        And those that are the `consumer`'s own without its knowledge: a call that failed had them
        handed out, or the server has forgotten that they were acknowledged. `claim` does that too.
        """
        ...

    async def cancel(self, model: ModelName, entry_id: str) -> bool:
        """Remove an entry that nobody has claimed; False when it was claimed or is gone."""
        ...

    async def contains(self, model: ModelName, entry_id: str) -> bool:
        """Whether the entry still exists, claimed or not (it does not after data loss)."""
        ...

    async def holder(self, model: ModelName, entry_id: str) -> str | None:
        """Return the consumer that holds an entry, None when nobody does or it is gone."""
        ...

    async def depth(self, model: ModelName) -> QueueDepth:
        """Count the entries of a model's queue."""
        ...

    async def arrivals(self, model: ModelName) -> Arrivals:
        """Say how far a model's queue has come."""
        ...

    async def wait_arrival(self, model: ModelName, since: Arrivals, *, block_s: float) -> bool:
        """Return True once an entry was appended after `since`, False after `block_s` without one.

        Nothing is claimed: everybody who waits hears of every entry.
        """
        ...

    async def drop(self, model: ModelName) -> None:
        """Remove the whole queue of a model that was removed. Idempotent."""
        ...

    async def close(self) -> None:
        """Close connections; claimed entries stay claimed."""
        ...


__all__ = [
    "Arrivals",
    "ClusterState",
    "Fence",
    "JobQueue",
    "KeyDeleted",
    "KeyPut",
    "Lease",
    "QueueDepth",
    "QueuedJob",
    "Snapshot",
    "StateEntry",
    "WatchItem",
]
