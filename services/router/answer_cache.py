"""Whole answers to requests that come again: exact, within one tenant, of the deployment as it is.

An answer is kept where the same request must get the same one: greedy ones, and sampled ones with a
seed. Its key is a digest of all that could change it: tenant, prompts and sampling, the stages in
force with their thresholds and the bytes of their models. So a model that is registered anew, or
another plan, never meets an older answer; what can't be met any more is dropped. Each deployment
has its own memory in each router; what spares the fewest FLOPs a byte leaves first.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import msgspec

from gearfall.core.gears.gear_records import GearPlanRecord
from gearfall.core.generation.job import Priority
from gearfall.core.greedy_dual import GreedyDual
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ModelRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from services.router.answer_record import KeptAnswer, answer_from_bytes, answer_to_bytes
from services.router.gears.gear_board import PinnedGear
from services.router.generation import GenerationRequest

_NOT_IN_KEY = frozenset({"request_id", "timeout_s", "priority", "is_whole"})
"""Fields of a request that change when an answer comes, or whether, and not what it is. Every other
one counts, also one that is yet to be added."""
Records = Mapping[ModelName, ModelRecord]
Models = tuple[tuple[str, str], ...]
"""(name, digest) of the models whose bytes an answer depends on."""


@dataclass(frozen=True, slots=True)
class AnswerKey:
    """Names one answer."""

    models: Models
    digest: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """An answer that is being computed; None in the end if it can't be given to others."""

    deadline_s: float
    """Of the request that computes it, on the loop's clock: it has landed by then."""
    landed: "asyncio.Future[KeptAnswer | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def answer(self) -> KeptAnswer | None:
        """Wait for it; whoever waits and is cancelled leaves the others waiting."""
        return await asyncio.shield(self.landed)


@dataclass(slots=True)
class Ticket:
    """One request's place at the cache."""

    deployment: DeploymentName
    key: AnswerKey
    priority: Priority
    """A request waits only for one of its own class."""
    answer: KeptAnswer | None = None
    """Of a hit, from the start or once a flight has landed."""
    is_leading: bool = False
    """Whether it computes the answer that others may wait for."""


class AnswerCache:
    """Owner of the kept answers of one router, and of what is being computed for them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._kept: dict[DeploymentName, GreedyDual[AnswerKey]] = {}
        self._plans: dict[DeploymentName, GearPlanRecord | None] = {}
        """That the kept answers were given under."""
        self._flights: dict[tuple[AnswerKey, Priority], Flight] = {}

    def ticket(
        self,
        request: GenerationRequest,
        deployment: DeploymentRecord,
        gear: PinnedGear | None,
    ) -> Ticket | None:
        """Look for the answer to a request of `deployment`, with the stages that are in force.

        None where the deployment keeps none, or where this answer must not be given again.
        """
        if not deployment.cache_bytes or not _is_repeatable(request):
            return None
        models = _models_of(deployment, self._cluster.view.models)
        if models is None:
            return None
        key = AnswerKey(models, _digest(request, deployment, gear, models))
        content = self._of(deployment).get(key)
        found = None if content is None else answer_from_bytes(content)
        return Ticket(deployment.name, key, request.priority, found)

    def flight(self, ticket: Ticket, deadline_s: float) -> Flight | None:
        """Return the flight that another request leads for this answer and ends by then."""
        flight = self._flights.get((ticket.key, ticket.priority))
        return flight if flight is not None and flight.deadline_s <= deadline_s else None

    def lead(self, ticket: Ticket, deadline_s: float) -> None:
        """The ticket's request computes the answer: who comes now may wait for it.

        Not where another one leads already.
        """
        place = (ticket.key, ticket.priority)
        if place not in self._flights:
            self._flights[place] = Flight(deadline_s)
            ticket.is_leading = True

    def land(self, ticket: Ticket, answer: KeptAnswer | None) -> None:
        """The ticket's request ended; keep its answer unless None, which must not be given again.

        What computing it cost is what keeping it is worth.
        """
        if ticket.is_leading:
            ticket.is_leading = False
            self._flights.pop((ticket.key, ticket.priority)).landed.set_result(answer)
        view = self._cluster.view
        deployment = view.deployments.get(ticket.deployment)
        if answer is None or deployment is None or not deployment.cache_bytes:
            return
        if _is_current(ticket.key.models, view.models):
            self._of(deployment).put(ticket.key, answer_to_bytes(answer), answer.cost_flops)

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """By deployment: bytes, answers, and how many had to leave so far."""
        return {name: (k.used_bytes, len(k), k.evictions) for name, k in self._kept.items()}

    async def run(self) -> None:
        """Drop what can't be met any more as the cluster changes, for ever."""
        async for kinds in self._cluster.changes():
            if kinds & {"models", "deployments", "gear_plans"}:
                self._drop_stale(self._cluster.view)

    def check(self) -> None:
        """Assert the invariant: every deployment's answers fit its memory."""
        for kept in self._kept.values():
            kept.check()

    def _of(self, deployment: DeploymentRecord) -> GreedyDual[AnswerKey]:
        kept = self._kept.get(deployment.name)
        if kept is None:
            kept = self._kept[deployment.name] = GreedyDual(deployment.cache_bytes)
            self._plans[deployment.name] = self._cluster.view.gear_plans.get(deployment.name)
        if kept.limit_bytes != deployment.cache_bytes:
            kept.set_limit(deployment.cache_bytes)
        return kept

    def _drop_stale(self, view: ClusterView) -> None:
        for name in tuple(self._kept):
            deployment, plan = view.deployments.get(name), view.gear_plans.get(name)
            # A plan may be written over with another one of its version.
            is_other = self._plans.get(name, plan) != plan
            self._plans[name] = plan
            if deployment is None or not deployment.cache_bytes or is_other:
                del self._kept[name], self._plans[name]
                continue
            kept = self._of(deployment)
            kept.discard_where(lambda key: not _is_current(key.models, view.models))


def _is_repeatable(request: GenerationRequest) -> bool:
    return request.temperature == 0.0 or request.seed is not None


def _models_of(deployment: DeploymentRecord, models: Records) -> Models | None:
    """Return the bytes behind a deployment's stages, bases of adapters too; None if unknown."""
    found: dict[str, str] = {}
    for stage in deployment.stages:
        record = models.get(stage.model)
        if record is None:
            return None
        found[record.name] = record.digest
        if record.base:
            found[record.base] = record.base_digest
    return tuple(found.items())


def _is_current(models: Models, records: Records) -> bool:
    known = ((records.get(ModelName(name)), digest) for name, digest in models)
    return all(record is not None and record.digest == digest for record, digest in known)


def _digest(
    request: GenerationRequest,
    deployment: DeploymentRecord,
    gear: PinnedGear | None,
    models: Models,
) -> bytes:
    if request.temperature == 0.0 and not any(each.self_consistency for each in deployment.stages):
        request = replace(request, top_p=1.0, top_k=0, seed=None)
    asked = [
        (each.name, getattr(request, each.name))
        for each in fields(request)
        if each.name not in _NOT_IN_KEY
    ]
    answered_by = (
        deployment.name,
        deployment.stages,
        deployment.certainty,
        deployment.streaming,
        None if gear is None else gear.deployment,
        models,
    )
    content = msgspec.msgpack.encode((asked, answered_by))
    return hashlib.blake2b(content, digest_size=32).digest()
