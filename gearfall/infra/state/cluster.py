"""The typed face of cluster state that all services use: a live view and one writer per kind."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator

from gearfall.core.errors import Conflict, GearfallError, Internal, Unavailable
from gearfall.core.gears.gear_records import DriftRecord, GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.ports import ClusterState, Fence, Lease
from gearfall.core.records import (
    AssignmentRecord,
    DecisionRecord,
    DemandRecord,
    DeploymentRecord,
    LearnedRecord,
    LoadRecord,
    ModelRecord,
    MoveRecord,
    NodeRecord,
    PrefetchRecord,
    ReplicaRecord,
    RouterRecord,
    SchedulerRecord,
    WorkerRecord,
)
from gearfall.infra.state.change_feed import Change, ChangeFeed, Changes
from gearfall.infra.state.cluster_keys import (
    ALL_KINDS,
    Record,
    encode_record,
    key_of,
    key_of_record,
)
from gearfall.infra.state.cluster_view import Applied, ClusterView, ViewBuilder
from gearfall.infra.state.drift_write import put_joined

_log = logging.getLogger(__name__)


class Cluster:
    """Follows cluster state in the background and writes typed records to it.

    Does not own `state`: the caller closes it after `stop()`. Writes return the revision they got;
    they raise Unavailable when state can't be reached, and Conflict when a fence no longer
    holds, a created record is there already, or the lease of the write has ended.
    """

    def __init__(self, state: ClusterState, *, lasting: Collection[str] = ()) -> None:
        """`lasting`: kinds that stay in the view when state loses its memory (`ViewBuilder`)."""
        self.state = state
        self._builder = ViewBuilder(lasting)
        self._task: asyncio.Task[None] | None = None
        self._applied = asyncio.Condition()
        self._listeners: set[_Listener] = set()
        self._feeds: set[ChangeFeed] = set()
        self._is_stopped = False
        self._failure: GearfallError | None = None

    @property
    def view(self) -> ClusterView:
        """The cluster as of the last change that arrived; an immutable value."""
        return self._builder.view

    @property
    def revision(self) -> int:
        """Of `view`, without making one."""
        return self._builder.revision

    async def start(self, *, timeout_s: float = 15.0) -> None:
        """Return once the first snapshot is in `view`; Unavailable if it takes longer."""
        self._task = asyncio.create_task(self._follow(), name="cluster-view")
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: self.revision > 0)
        except BaseException as error:
            await self.stop()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"no cluster state within {timeout_s:g} s") from None
            raise

    async def stop(self) -> None:
        """End the background task and every `changes()` iterator. Idempotent."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        await self._end()

    async def changes(self) -> AsyncGenerator[frozenset[str]]:
        """Yield the kinds that changed since the last item, coalesced; all kinds at once at first.

        Ends when the cluster is stopped. Raises Internal if the view can no longer follow.
        """
        listener = _Listener()
        self._listeners.add(listener)
        try:
            while not self._is_stopped:
                self._raise_if_broken()
                yield listener.take()
                if not self._has_ended():
                    await listener.wait()
        finally:
            self._listeners.discard(listener)

    @contextlib.contextmanager
    def following(self) -> Iterator[ChangeFeed]:
        """Give every change record by record, beginning with the whole view."""
        feed = ChangeFeed(self.view)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.discard(feed)

    async def record_changes(self) -> AsyncGenerator[Changes]:
        """Yield what changed since the last item, record by record; the whole view at first.

        Ends when the cluster is stopped. Raises Internal if the view can no longer follow.
        """
        with self.following() as feed:
            while not self._is_stopped:
                self._raise_if_broken()
                yield feed.take()
                if not self._has_ended():
                    await feed.wait()

    async def wait_seen(self, revision: int, *, timeout_s: float = 5.0) -> None:
        """Return when `view` includes `revision`, as a write returned it; else Unavailable."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._until(lambda: self._has_seen(revision))
        except TimeoutError:
            raise Unavailable(f"revision {revision} not seen within {timeout_s:g} s") from None

    async def wait_until(
        self, holds: Callable[[ClusterView], bool], *, timeout_s: float = 10.0
    ) -> ClusterView:
        """Return the first view of which `holds` is true; Unavailable if none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self.changes():
                    if holds(self.view):
                        return self.view
        except TimeoutError:
            raise Unavailable(f"not seen in cluster state within {timeout_s:g} s") from None
        raise Unavailable("the cluster view is stopped")

    async def catch_up(self, record: SchedulerRecord, *, lease: Lease) -> None:
        """Return when `view` includes all that was written before, by anybody; else Unavailable.

        Puts the scheduler's own record again and waits for it: cluster state may count writes of
        strangers, which this view never sees.
        """
        await self.wait_seen(await self.put_scheduler(record, lease=lease))

    async def write_back(self, kinds: Collection[str]) -> None:
        """Create what a state that lost its memory no longer has and this view kept."""
        for kind, record_id in sorted(self._builder.kept):
            if kind in kinds:
                with contextlib.suppress(Conflict):  # another one was faster
                    await self._create(kind, getattr(self.view, kind)[record_id])

    def check_follows(self) -> None:
        """Raise Internal when the view no longer follows cluster state."""
        self._raise_if_broken()

    async def grant_lease(self, ttl_s: float) -> Lease:
        """Grant a lease that is kept alive until it is revoked or lost."""
        return await self.state.grant_lease(ttl_s)

    async def put_model(self, record: ModelRecord) -> int:
        """Create or replace a model."""
        return await self._put("models", record)

    async def delete_model(self, name: ModelName) -> int:
        """Delete a model and return the revision, 0 when it was not there."""
        revision = await self._delete(key_of("models", name))
        await self._announce(self._builder.forget("models", name))
        return revision

    async def put_deployment(self, record: DeploymentRecord) -> int:
        """Create or replace a deployment."""
        return await self._put("deployments", record)

    async def delete_deployment(self, name: DeploymentName) -> int:
        """Delete a deployment and return the revision, 0 when it was not there."""
        revision = await self._delete(key_of("deployments", name))
        await self._announce(self._builder.forget("deployments", name))
        return revision

    async def put_node(self, record: NodeRecord, *, lease: Lease) -> int:
        """Publish a live store under its lease."""
        return await self._put("nodes", record, lease=lease)

    async def put_worker(self, record: WorkerRecord, *, lease: Lease) -> int:
        """Publish a live worker under its lease."""
        return await self._put("workers", record, lease=lease)

    async def put_router(self, record: RouterRecord, *, lease: Lease) -> int:
        """Publish a live router under its lease."""
        return await self._put("routers", record, lease=lease)

    async def put_scheduler(self, record: SchedulerRecord, *, lease: Lease) -> int:
        """Publish a live scheduler, leading or not, under its lease."""
        return await self._put("schedulers", record, lease=lease)

    async def put_assignment(self, record: AssignmentRecord, *, fence: Fence) -> int:
        """Write the leader's wish that a worker hosts a model."""
        return await self._put("assignments", record, fence=fence)

    async def delete_assignment(
        self, worker_id: WorkerId, model: ModelName, *, fence: Fence
    ) -> int:
        """Take the wish back and return the revision, 0 when it was not there."""
        return await self._delete(key_of("assignments", worker_id, model), fence=fence)

    async def put_replica(self, record: ReplicaRecord, *, lease: Lease) -> int:
        """Publish what a worker hosts, under the worker's lease."""
        return await self._put("replicas", record, lease=lease)

    async def delete_replica(self, worker_id: WorkerId, model: ModelName) -> int:
        """Delete a replica and return the revision, 0 when it was not there."""
        return await self._delete(key_of("replicas", worker_id, model))

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        """Publish that jobs wait at a router, under the router's lease."""
        return await self._put("demand", record, lease=lease)

    async def delete_demand(self, model: ModelName, router_id: RouterId) -> int:
        """Say that nothing waits any more and return the revision, 0 when nothing did."""
        return await self._delete(key_of("demand", model, router_id))

    async def put_load(self, record: LoadRecord, *, lease: Lease) -> int:
        """Publish what came to a router for a model, under the router's lease."""
        return await self._put("load", record, lease=lease)

    async def delete_load(self, model: ModelName, router_id: RouterId) -> int:
        """Forget the load of a model that is idle; say whether there was one."""
        return await self._delete(key_of("load", model, router_id))

    async def put_move(self, record: MoveRecord, *, fence: Fence) -> int:
        """Write down that a replica moves, before the first step."""
        return await self._put("moves", record, fence=fence)

    async def delete_move(self, worker_id: WorkerId, model: ModelName, *, fence: Fence) -> int:
        """Forget a move that is done or given up; returns as the others do."""
        return await self._delete(key_of("moves", worker_id, model), fence=fence)

    async def put_prefetch(self, record: PrefetchRecord, *, fence: Fence) -> int:
        """Wish that a node has a model near."""
        return await self._put("prefetch", record, fence=fence)

    async def delete_prefetch(self, node_id: NodeId, model: ModelName, *, fence: Fence) -> int:
        """Take the wish back and return the revision, 0 when it was not there."""
        return await self._delete(key_of("prefetch", node_id, model), fence=fence)

    async def put_learned(self, record: LearnedRecord, *, fence: Fence) -> int:
        """Keep what the leader learned for the next one."""
        return await self._put("learned", record, fence=fence)

    async def put_gear_plan(self, record: GearPlanRecord) -> int:
        """Have a deployment follow a gear plan, in place of the one before."""
        return await self._put("gear_plans", record)

    async def put_gear_vote(self, record: GearVoteRecord, *, lease: Lease) -> int:
        """Publish the gear that a router wants, under the router's lease."""
        return await self._put("gear_votes", record, lease=lease)

    async def delete_gear_plan(self, name: DeploymentName) -> bool:
        """Have a deployment follow its own stages again and say whether it had a plan."""
        return (await self._delete(key_of("gear_plans", name))) > 0

    async def put_drift(self, record: DriftRecord) -> int:
        """Have all routers heed what became of a plan's cascade, and what others found of it."""
        return await put_joined(self.state, record)

    async def delete_drift(self, name: DeploymentName, cascade: str) -> int:
        """Forget it: another plan is to be measured; returns as the others do."""
        revision = await self._delete(key_of("drift", name, cascade))
        await self._announce(self._builder.forget("drift", (name, cascade)))
        return revision

    async def put_decision(self, record: DecisionRecord, *, fence: Fence) -> int:
        """Record the leader's last decision about a model."""
        return await self._put("decisions", record, fence=fence)

    async def delete_decision(self, model: ModelName, *, fence: Fence) -> int:
        """Forget it: the model was removed; returns as the others do."""
        return await self._delete(key_of("decisions", model), fence=fence)

    async def _put(
        self, kind: str, record: Record, *, lease: Lease | None = None, fence: Fence | None = None
    ) -> int:
        key = key_of_record(kind, record)
        return await self._write(
            self.state.put(key, encode_record(record), lease=lease, fence=fence)
        )

    async def _create(self, kind: str, record: Record) -> int:
        key = key_of_record(kind, record)
        return await self._write(
            self.state.compare_and_set(key, encode_record(record), expected_mod_revision=0)
        )

    async def _delete(self, key: str, *, fence: Fence | None = None) -> int:
        return await self._write(self.state.delete(key, fence=fence))

    async def _write(self, write: Awaitable[int]) -> int:
        seen, losses = self.revision, self._builder.losses
        if revision := await write:
            self._compare_life(revision, seen + 1, losses)
        return revision

    def _compare_life(self, revision: int, least: int, losses: int) -> None:
        """Begin anew from a listing when cluster state answered with an older revision than it can.

        It has lost its memory then, and the watch has not told yet. `losses`: when it was asked.
        """
        is_known = self._builder.is_loss_expected or losses != self._builder.losses
        is_news = revision < least and not is_known
        if is_news and self._task is not None and not self._is_stopped:
            self._builder.is_loss_expected = True
            self._task.cancel()
            self._task = asyncio.create_task(self._follow(), name="cluster-view")

    def _has_seen(self, revision: int) -> bool:
        return self.revision >= revision and not self._builder.is_loss_expected

    async def _follow(self) -> None:
        try:
            async for item in self.state.watch(""):
                await self._announce(self._builder.apply(item))
            self._failure = Unavailable("cluster state was closed under the cluster view")
        except Exception as error:
            _log.exception("the cluster view can't follow cluster state")
            self._failure = Internal(f"the cluster view no longer follows cluster state: {error}")
        await self._end()

    async def _announce(self, applied: Applied) -> None:
        """Tell everybody who waits what one watch item changed."""
        for feed in self._feeds:
            if applied.is_restart:
                feed.restart(self.view)
            else:
                changes = () if applied.change is None else (Change(*applied.change),)
                feed.add(changes, self.revision)
        if applied.kinds:
            for listener in self._listeners:
                listener.notify(applied.kinds)
        await self._notify_applied()

    async def _end(self) -> None:
        """Wake everybody who waits: nothing comes any more."""
        for feed in self._feeds:
            feed.wake()
        for listener in self._listeners:
            listener.notify(frozenset())
        await self._notify_applied()

    async def _notify_applied(self) -> None:
        async with self._applied:
            self._applied.notify_all()

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with self._applied:
            await self._applied.wait_for(lambda: self._has_ended() or holds())
        self._raise_if_broken()
        if not holds():
            raise Unavailable("the cluster view is stopped")

    def _has_ended(self) -> bool:
        return self._is_stopped or self._failure is not None

    def _raise_if_broken(self) -> None:
        if self._failure is not None and not self._is_stopped:
            raise self._failure


class _Listener:
    """Kinds that changed and were not yet taken by one `changes()` iterator."""

    def __init__(self) -> None:
        self._kinds = ALL_KINDS
        self._event = asyncio.Event()

    def notify(self, kinds: frozenset[str]) -> None:
        self._kinds |= kinds
        self._event.set()

    def take(self) -> frozenset[str]:
        kinds, self._kinds = self._kinds, frozenset()
        self._event.clear()
        return kinds

    async def wait(self) -> None:
        await self._event.wait()
