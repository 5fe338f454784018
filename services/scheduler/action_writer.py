"""Writes what a decision asked for, every write under the leader's fence.

Starts, wishes, reasons and what was learned may be written behind, while the next decision is made
already: whoever waits for a start does not wait for the round trip of the one before.

A write that is under way when its leader is deposed is not cut off: it ends, taken or refused, and
is written down in the process's history as what it was.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence

from gearfall.core.errors import Conflict, GearfallError, Unavailable
from gearfall.core.generation.history import Refused, Wrote
from gearfall.core.ports import Fence
from gearfall.core.records import DecisionRecord, LearnedRecord
from gearfall.infra.failpoints import failpoint_async
from gearfall.infra.history_log import record
from gearfall.infra.state.cluster import Cluster
from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Undecide,
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
    Undecide: ("undecide", "decisions"),
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
        """`on_decision` gets each decision that was written; `on_failed` is called when something
        could not be written behind: `raise_failed` then says why. A refused reason is logged.
        """
        self._cluster = cluster
        self._fence = fence
        self._on_decision = on_decision
        self._on_failed = on_failed
        self._in_flight: set[asyncio.Task[int]] = set()
        self._plans: set[asyncio.Task[int]] = set()
        self._reasons: asyncio.Task[None] | None = None
        self._behind: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether something could not be written behind."""
        return self._failure is not None

    @property
    def behind(self) -> int:
        """How much is on its way that nobody has waited for."""
        return len(self._behind)

    def raise_failed(self) -> None:
        """Raise what kept something from being written behind, once."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def write_behind(self, actions: Sequence[Action], on_seen: Callable[[int], None]) -> None:
        """Begin to write a plan; `on_seen` gets the highest revision once the view has it."""
        if not actions:
            return
        plan = self._begin_plan(actions)

        async def write() -> None:
            revision = await plan
            await self._cluster.wait_seen(revision)
            on_seen(revision)

        self._begin(write)

    def write_learned_behind(self, learned: LearnedRecord, on_written: Callable[[], None]) -> None:
        """Begin to keep what was learned for the next leader."""

        async def write() -> None:
            await self.write_learned(learned)
            on_written()

        self._begin(write)

    async def settled(self) -> None:
        """Return when nothing is on its way behind any more, and raise what failed."""
        while self._behind:
            await asyncio.wait(self._behind)
        self.raise_failed()

    def _begin(self, write: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._noting_failure(write))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _noting_failure(self, write: Callable[[], Awaitable[None]]) -> None:
        try:
            await write()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # Who is deposed has nothing to try again, whatever else fails.
        if self._failure is None or isinstance(error, Conflict):
            self._failure = error
        self._on_failed()

    async def write_all(self, actions: Sequence[Action]) -> int:
        """Write a plan's steps and return the highest revision that one of them got.

        Its reasons are on their way then, behind those of the plan before.
        """
        return await self._begin_plan(actions)

    def _begin_plan(self, actions: Sequence[Action]) -> asyncio.Task[int]:
        """Begin to write steps. Plans may be written beside each other; their reasons stay in the
        order in which the plans were made, so that the last reason is what stands.
        """
        steps, reasons = parted(actions)
        plan = asyncio.create_task(self._write_steps(steps))
        self._plans.add(plan)
        plan.add_done_callback(self._plans.discard)
        if reasons:
            self._reasons = asyncio.create_task(self._write_reasons(reasons, plan, self._reasons))
        return plan

    async def _write_steps(self, steps: Sequence[Action]) -> int:
        seen = 0
        for batch in in_batches(steps):
            seen = max(seen, *await self._together([self._write(each) for each in batch]))
        return seen

    async def _write_reasons(
        self,
        reasons: Sequence[Action],
        plan: asyncio.Task[int],
        before: "asyncio.Task[None] | None",
    ) -> None:
        if before is not None:
            await before
        await asyncio.wait((plan,))
        if plan.cancelled() or plan.exception() is not None:
            return  # what they explain was not done
        for batch in in_batches(reasons):
            try:
                await self._together([self._write(each) for each in batch])
            except (Conflict, Unavailable) as error:
                self._fail(error)
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
        """Begin nothing more, and return when no write is under way: each ends in its own time."""
        for task in (*self._plans, *self._behind):
            task.cancel()
        reasons = () if self._reasons is None else (self._reasons,)
        ending = (*self._plans, *self._behind, *reasons, *self._in_flight)
        await asyncio.gather(*ending, return_exceptions=True)

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
            case Undecide(model):
                written = cluster.delete_decision(model, fence=fence)
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
        case Wish() | Unwish() | Decide() | Undecide():
            pass
