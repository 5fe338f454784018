"""What is registered and deployed, and the operators' calls that change it."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from gearfall.core.certainty.escalation import check_has_target
from gearfall.core.errors import Conflict, GearfallError, InvalidRequest, NotFound, Unavailable
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.gears.gear_records import GearPlanRecord
from gearfall.core.ids import DeploymentName, ModelName, parse_name
from gearfall.core.ports import JobQueue
from gearfall.core.records import DeploymentRecord, NodeRecord
from gearfall.infra.net.remote import is_url
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.pb import store_pb2
from services.router.cluster.deployment_checks import (
    check_deployment,
    check_is_compared,
    check_plan_fits,
    promised_p95_s,
)
from services.router.cluster.peers import Peers

_log = logging.getLogger(__name__)

_SEEN_S = 10.0
_DRAINED_S = 20.0
"""How long a removed model's idle replicas have to go, and then its last leases."""
_LEASED_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class _NodeEnd:
    """The registration on one node is over."""

    error: GearfallError | None


class Catalogue:
    """Models and deployments of the cluster. Writes return once this router's view shows them."""

    def __init__(
        self,
        cluster: Cluster,
        queue: JobQueue,
        peers: Peers,
        *,
        is_model_used: Callable[[ModelName], bool],
    ) -> None:
        """`is_model_used`: whether a running request of this router needs the model."""
        self._cluster = cluster
        self._queue = queue
        self._peers = peers
        self._is_model_used = is_model_used

    @property
    def view(self) -> ClusterView:
        """The cluster as this router sees it."""
        return self._cluster.view

    async def register_model(
        self, name: str, path: str, base: str = ""
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        """Register a directory with every live store at once and yield the progress of all.

        `base` names the model that a LoRA adapter belongs to, where it does not say so itself.
        Goes on where one store fails, then raises the first failure: what a store has stays.
        """
        parse_name(name, param="name")
        if not path.startswith("/") and not is_url(path):
            raise InvalidRequest(f"path {path[:200]!r} is neither absolute nor a URL", param="path")
        if DeploymentName(name) in self._cluster.view.deployments:
            raise Conflict(f"a deployment has the name {name}", param="name")
        nodes = tuple(self._cluster.view.nodes.values())
        if not nodes:
            raise Unavailable("no store is up", retry_after_s=2.0)
        call = store_pb2.RegisterModelRequest(name=name, path=path, base=base)
        async for progress in self._register_on(nodes, call):
            yield progress

    async def remove_model(self, name: str) -> None:
        """Remove a model from the cluster, then its replicas, its queue and every store's copy.

        NotFound; Conflict while a deployment names it or a request runs on it; Unavailable when
        its replicas do not go: then a second call goes on from there.
        """
        view = self._cluster.view
        model = ModelName(name)
        if model not in view.models:
            raise NotFound(f"model {name!r} is not registered", param="name")
        users = [each.name for each in view.deployments.values() if _names(each, model)]
        if users:
            raise Conflict(f"model {name} is a stage of {', '.join(sorted(users))}", param="name")
        adapters = sorted(each.name for each in view.models.values() if each.base == model)
        if adapters:
            raise Conflict(f"model {name} is the base of {', '.join(adapters[:8])}", param="name")
        if self._is_model_used(model):
            raise Conflict(f"requests are running on model {name}", param="name")
        await self._cluster.put_model(replace(view.models[model], is_removing=True))
        await self._cluster.wait_until(lambda now: not _is_hosted(model, now), timeout_s=_DRAINED_S)
        try:
            async with asyncio.timeout(_DRAINED_S):
                for node in view.nodes.values():
                    await self._delete_at(node, name)
        except TimeoutError:
            raise Unavailable(f"model {name} is still leased by a worker") from None
        await self._cluster.delete_model(model)
        await self._queue.drop(model)
        await self._cluster.wait_until(lambda now: model not in now.models)

    async def _delete_at(self, node: NodeRecord, name: str) -> None:
        """Have a store delete a model once its last lease ends, of which the view does not tell."""
        while True:
            try:
                return await self._peers.delete_model(node, name)
            except Conflict as error:
                _log.info("still leased", extra={"model": name, "reason": error.message})
            await asyncio.sleep(_LEASED_RETRY_S)

    async def put_deployment(
        self, record: DeploymentRecord, *, gear_plan: str = ""
    ) -> tuple[DeploymentRecord, int]:
        """Create or replace a deployment after `check_deployment`; return it with its revision.

        With a gear plan its gears decide about the stages, without one the record does. Thresholds
        that were raised above those of the plan before, and alarms, are forgotten. Raises
        InvalidRequest for a plan that is broken, bears another name, or speaks of other checkpoints
        than those registered.
        """
        check_deployment(record, self._cluster.view)
        check_is_compared(record, has_plan=bool(gear_plan))
        plan = parse_plan(gear_plan) if gear_plan else None
        check_has_target(record.escalation, [] if plan is None else promised_p95_s(plan))
        if plan is not None:
            check_plan_fits(plan, record, self._cluster.view.models)
            await self._cluster.put_gear_plan(self._plan_record(record.name, plan, gear_plan))
        else:
            await self._cluster.delete_gear_plan(record.name)
        await self._forget_drift(record.name)
        revision = await self._cluster.put_deployment(record)
        await self._cluster.wait_seen(revision, timeout_s=_SEEN_S)
        return record, revision

    def _plan_record(self, name: DeploymentName, plan: GearPlan, content: str) -> GearPlanRecord:
        """Return what to write: another record than the one that stands, also for the same plan."""
        now_unix_s, before = time.time(), self._cluster.view.gear_plans.get(name)
        if before is not None:
            now_unix_s = max(now_unix_s, math.nextafter(before.deployed_unix_s, math.inf))
        return GearPlanRecord(name, plan.version, content, now_unix_s)

    async def remove_deployment(self, name: str) -> None:
        """Remove a deployment; requests that run keep what they were admitted with."""
        if not await self._cluster.delete_deployment(DeploymentName(name)):
            raise NotFound(f"there is no deployment {name!r}", param="name")
        await self._cluster.delete_gear_plan(DeploymentName(name))
        await self._forget_drift(DeploymentName(name))
        await self._cluster.wait_until(lambda now: DeploymentName(name) not in now.deployments)

    async def _forget_drift(self, name: DeploymentName) -> None:
        for deployment, cascade in tuple(self._cluster.view.drift):
            if deployment == name:
                await self._cluster.delete_drift(name, cascade)

    async def _register_on(
        self, nodes: tuple[NodeRecord, ...], call: store_pb2.RegisterModelRequest
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        merged: asyncio.Queue[store_pb2.RegisterProgress | _NodeEnd] = asyncio.Queue()
        tasks = [asyncio.create_task(self._register_one(each, call, merged)) for each in nodes]
        errors: list[GearfallError] = []
        left = len(tasks)
        try:
            while left:
                item = await merged.get()
                if isinstance(item, _NodeEnd):
                    left -= 1
                    errors += [item.error] if item.error else []
                else:
                    yield item
            if errors:
                raise errors[0]
            await self._cluster.wait_until(lambda now: ModelName(call.name) in now.models)
        finally:
            for task in tasks:
                task.cancel()

    async def _register_one(
        self,
        node: NodeRecord,
        call: store_pb2.RegisterModelRequest,
        merged: "asyncio.Queue[store_pb2.RegisterProgress | _NodeEnd]",
    ) -> None:
        try:
            async for progress in self._peers.register_model(node, call):
                merged.put_nowait(progress)
        except GearfallError as error:
            merged.put_nowait(_NodeEnd(error))
        except Exception as error:
            _log.exception("registration failed", extra={"model": call.name, "node": node.node_id})
            merged.put_nowait(_NodeEnd(Unavailable(f"store {node.node_id}: {error}")))
        else:
            merged.put_nowait(_NodeEnd(None))


def _names(record: DeploymentRecord, model: ModelName) -> bool:
    return any(stage.model == model for stage in record.stages)


def _is_hosted(model: ModelName, view: ClusterView) -> bool:
    is_adapter_held = any(model in replica.adapters for replica in view.replicas.values())
    is_placed = any(hosted == model for _, hosted in (*view.replicas, *view.assignments))
    return is_placed or is_adapter_held
