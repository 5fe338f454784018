"""Writes what a decision asked for, every write under the leader's fence.

Reasons are written behind the steps while the next decision is made already: whoever waits for a
start does not wait for what `gearfall why` says of the one before.

A write that is under way when its leader is deposed is not cut off: it ends, taken or refused, and
is written down in the process's history as what it was.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from gearfall.core.errors import Conflict, GearfallError, Unavailable
from gearfall.core.history import Refused, Wrote
from gearfall.core.ports import Fence
from gearfall.core.records import DecisionRecord, LearnedRecord
from gearfall.infra.cluster import Cluster
from gearfall.infra.failpoints import failpoint_async
from gearfall.infra.history_log import record
from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Unwish,
    Wish,
)
from services.scheduler.write_order import in_batches, key_ids, parted

_log = logging.getLogger(__name__)

_POINTS: dict[type, tuple[str, str]] = {
    Assign: ("assign", "assignments"),
    Unassign: ("unassign", "assignments"),
    BeginMove: ("move", "moves"),
    EndMove: ("moved", "moves"),
    Wish: ("wish", "prefetch"),
    Unwish: ("unwish", "prefetch"),
    Decide: ("decide", "decisions"),
}
"""Failpoint and kind of record of each action."""


class ActionWriter:
    """One term's writes. Raises Conflict once another leads, Unavailable while nothing answers."""

    def __init__(
        self,
        cluster: Cluster,
        fence: Fence,
        *,
        on_decision: Callable[[DecisionRecord], None] = lambda _: None,
        on_failed: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_decision` gets each decision that was written; `on_failed` is called when reasons
        could not be written behind: `raise_failed` then says why. One that was refused is logged.
        """
        self._cluster = cluster
        self._fence = fence
        self._on_decision = on_decision
        self._on_failed = on_failed
        self._in_flight: set[asyncio.Task[int]] = set()
        self._behind: asyncio.Task[None] | None = None
        self._failure: Conflict | Unavailable | None = None

    @property
    def has_failed(self) -> bool:
        """Whether reasons could not be written."""
        return self._failure is not None

    def raise_failed(self) -> None:
        """Raise what kept reasons from being written, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    async def write_all(self, actions: Sequence[Action]) -> int:
        """Write a plan's steps and return the highest revision that one of them got.

        Its reasons are on their way then, behind those of the plan before.
        """
        seen = 0
        steps, reasons = parted(actions)
        for batch in in_batches(steps):
            seen = max(seen, *await self._together([self._write(each) for each in batch]))
        if reasons:
            self._behind = asyncio.create_task(self._write_reasons(reasons, self._behind))
        return seen

    async def _write_reasons(
        self, reasons: Sequence[Action], before: "asyncio.Task[None] | None"
    ) -> None:
        if before is not None:
            await before
        for batch in in_batches(reasons):
            try:
                await self._together([self._write(each) for each in batch])
            except (Conflict, Unavailable) as error:
                self._failure = error
                self._on_failed()
                return
            except GearfallError as error:
                # Refused for good: another decision would only have it refused again.
                _log.exception("reason refused", extra={"error": error.message})

    async def write_learned(self, learned: LearnedRecord) -> int:
        """Keep what was learned for the next leader."""
        writes = [
            self._perform(
                "learn",
                "learned",
                learned.subject,
                lambda: self._cluster.put_learned(learned, fence=self._fence),
            )
        ]
        return max(await self._together(writes))

    async def finish(self) -> None:
        """Return when no write is under way; each ends within its own deadline."""
        behind = () if self._behind is None else (self._behind,)
        await asyncio.gather(*behind, *self._in_flight, return_exceptions=True)

    async def _together(self, writes: Sequence[Coroutine[None, None, int]]) -> Sequence[int]:
        tasks = [asyncio.create_task(write) for write in writes]
        self._in_flight.update(tasks)
        for task in tasks:
            task.add_done_callback(self._in_flight.discard)
        results = await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))
        errors = [each for each in results if isinstance(each, BaseException)]
        for error in sorted(errors, key=_rank):
            raise error
        return [each for each in results if isinstance(each, int)]

    async def _write(self, action: Action) -> int:
        point, kind = _POINTS[type(action)]
        ids = key_ids(action)
        _log_step(action)
        revision = await self._perform(
            point, kind, "/".join(ids), lambda: self._put_or_delete(action), model=ids[-1]
        )
        if isinstance(action, Decide):
            self._on_decision(action.decision)
        return revision

    async def _perform(
        self, point: str, kind: str, key: str, write: Callable[[], Awaitable[int]], model: str = ""
    ) -> int:
        fence = self._fence.create_revision
        await failpoint_async(f"scheduler.{point}.before", model=model)
        try:
            revision = await write()
        except Conflict:
            record(Refused, kind, key, fence)
            raise
        record(Wrote, kind, key, fence, revision)
        await failpoint_async(f"scheduler.{point}.after", model=model)
        return revision

    async def _put_or_delete(self, action: Action) -> int:
        cluster, fence = self._cluster, self._fence
        match action:
            case Assign(assignment):
                written = cluster.put_assignment(assignment, fence=fence)
            case Unassign((worker_id, model), _):
                written = cluster.delete_assignment(worker_id, model, fence=fence)
            case BeginMove(move):
                written = cluster.put_move(move, fence=fence)
            case EndMove((worker_id, model), _):
                written = cluster.delete_move(worker_id, model, fence=fence)
            case Wish(prefetch):
                written = cluster.put_prefetch(prefetch, fence=fence)
            case Unwish((node_id, model), _):
                written = cluster.delete_prefetch(node_id, model, fence=fence)
            case Decide(decision):
                written = cluster.put_decision(decision, fence=fence)
        return await written


def _rank(error: BaseException) -> int:
    """Who is deposed has nothing to try again; a refusal does not hide what can be."""
    return 0 if isinstance(error, Conflict) else 1 if isinstance(error, Unavailable) else 2


def _log_step(action: Action) -> None:
    match action:
        case Assign(assignment):
            _log.info(
                "assigned",
                extra={
                    "model": assignment.model,
                    "worker": assignment.worker_id,
                    "reason": assignment.reason,
                    "predicted_s": assignment.predicted_start_s,
                },
            )
        case Unassign((worker_id, model), reason):
            _log.info("unassigned", extra={"model": model, "worker": worker_id, "reason": reason})
        case BeginMove(move):
            _log.info(
                "moves",
                extra={
                    "model": move.model,
                    "worker": move.worker_id,
                    "target": move.target,
                    "for_model": move.for_model,
                    "predicted_s": move.predicted_s,
                },
            )
        case EndMove((worker_id, model), reason):
            _log.info("move ended", extra={"model": model, "worker": worker_id, "reason": reason})
        case Wish() | Unwish() | Decide():
            pass
