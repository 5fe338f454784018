"""Which gear each deployment with a plan is in: this router's wish, and what all routers agree on.

Ten times a second the shift rule (`core/gears/gear_shift.py`) sees the load of all routers: this
one's as it is, the others' as their votes say it, and the fullest replica's memory. A wish that
changed is written as a vote; the highest vote for the plan in force counts everywhere, so that one
router's burst shifts all of them as fast as cluster state tells, and nobody has to lead. A dead
router's vote ends with its lease. Sampling never waits for a write: each deployment's vote is
written beside it, one at a time.

A request keeps the gear it was admitted with: `pin` gives it a value, and nothing here changes it.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.errors import GearfallError
from gearfall.core.gears.gear_plan import Gear, GearPlan, Promise, planned_up
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.gears.gear_shift import GearState, LoadSample, ShiftPolicy, shift
from gearfall.core.gears.gears_in_force import highest_vote, on_nodes
from gearfall.core.ids import DeploymentName, ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import ReplicaState, Stage
from gearfall.infra.state.cluster import Cluster
from services.router.jobs.backlog import Backlog

_log = logging.getLogger(__name__)

SAMPLE_S = 0.1
TYPICAL_ANSWER_TOKENS = 32.0
"""Before the first answers of a deployment were seen."""
_NEWEST_WEIGHT = 0.05
_WORTH_TELLING = 0.2
"""Relative change of this router's load that the others are told of."""


@dataclass(frozen=True, slots=True)
class PinnedGear:
    """What a request was admitted with."""

    version: int
    index: int
    stages: tuple[Stage, ...]
    certainty: str
    calibrations: Mapping[str, Calibration]
    promise: Promise
    agreement_rule: str
    planned: tuple[Stage, ...]
    """The stages with the thresholds of the plan."""
    hold_tokens: int = 0
    """Of answers, the first tokens that stages are decided on; 0: all."""
    deployed_unix_s: float = 0.0
    """When the plan was: one that is deployed again is another, though its version is the same."""
    tightened: int = 0
    """How often thresholds were raised above the plan's."""

    @property
    def deployment(self) -> tuple[float, int]:
        """What differs for every plan that is deployed."""
        return self.deployed_unix_s, self.version

    @property
    def planned_up(self) -> dict[ModelName, float]:
        """By model: share of the answers below it that the plan has go up to it."""
        return planned_up(self.planned, self.promise)

    @property
    def label(self) -> str:
        """How it is shown: plan version and gear, `+1` where thresholds were raised once."""
        raised = f"+{self.tightened}" if self.tightened else ""
        return f"{self.version}/{self.index}{raised}"


@dataclass(slots=True)
class _Following:
    """One deployment's plan and where this router stands in it."""

    record: GearPlanRecord
    plan: GearPlan
    state: GearState
    arrived_tokens: float = 0.0
    answer_tokens: float = TYPICAL_ANSWER_TOKENS
    answers: int = 0
    """That `answer_tokens` comes from."""
    told: GearVoteRecord | None = None
    """The vote that stands under the present lease."""
    gears: tuple[Gear, ...] = ()
    """In force: the plan's, or those of the variant for a node that is gone."""
    shifts: int = 0
    is_telling: bool = False
    """Whether a write of its vote is under way."""

    @property
    def models(self) -> set[ModelName]:
        """Of all gears in force."""
        return {stage.model for gear in self.gears for stage in gear.stages}


@dataclass(frozen=True, slots=True)
class _Queued:
    """Tokens that wait at this router for one deployment's models."""

    prompt: float = 0.0
    answer: float = 0.0

    @property
    def total(self) -> float:
        return self.prompt + self.answer


class GearBoard:
    """Owner of this router's gears."""

    def __init__(
        self,
        cluster: Cluster,
        router_id: RouterId,
        waiting: Callable[[], Mapping[ModelName, Backlog]],
        *,
        clock: Callable[[], float],
        policy: ShiftPolicy | None = None,
    ) -> None:
        """`waiting`: this router's unclaimed jobs by model. `clock`: monotonic seconds."""
        self._cluster = cluster
        self._router_id = router_id
        self._waiting = waiting
        self._clock = clock
        self._policy = policy or ShiftPolicy()
        self._following: dict[DeploymentName, _Following] = {}
        self._refused: dict[DeploymentName, GearPlanRecord] = {}
        self._lease: Lease | None = None

    def pin(self, name: DeploymentName) -> PinnedGear | None:
        """Return the gear in force for a deployment, None for one that follows no plan."""
        following = self._following.get(name)
        if following is None:
            return None
        index = self._in_force(following)
        plan, gear = following.plan, following.gears[index]
        return PinnedGear(
            plan.version,
            index,
            gear.stages,
            plan.certainty,
            plan.calibrations,
            gear.promise,
            plan.agreement_rule,
            gear.stages,
            plan.hold_tokens,
            following.record.deployed_unix_s,
        )

    def arrived(self, name: DeploymentName, prompt_tokens: int) -> None:
        """A request of a deployment came."""
        following = self._following.get(name)
        if following is not None:
            following.arrived_tokens += prompt_tokens + following.answer_tokens

    def answered(self, name: DeploymentName, completion_tokens: int) -> None:
        """A request of a deployment ended with so many tokens."""
        following = self._following.get(name)
        if following is not None:
            following.answers += 1
            weight = max(_NEWEST_WEIGHT, 1.0 / following.answers)
            missed = completion_tokens - following.answer_tokens
            following.answer_tokens += weight * missed

    def set_lease(self, lease: Lease) -> None:
        """The router has a new lease: its votes are written again."""
        self._lease = lease
        for following in self._following.values():
            following.told = None

    def gears_in_force(self) -> Mapping[str, tuple[int, int, int]]:
        """By deployment: plan version, gear, shifts of this router's wish so far."""
        return {
            name: (each.plan.version, self._in_force(each), each.shifts)
            for name, each in self._following.items()
        }

    async def run(self) -> None:
        """Follow plans as they come and go, and shift, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_plans())
            tasks.create_task(self._sample_for_ever(tasks))

    async def _follow_plans(self) -> None:
        async for kinds in self._cluster.changes():
            if kinds & {"gear_plans", "workers"}:
                self._take_plans()

    def _take_plans(self) -> None:
        plans = self._cluster.view.gear_plans
        for name in self._following.keys() - plans.keys():
            del self._following[name]
        for name, record in plans.items():
            known = self._following.get(name)
            if known is None or known.record != record:
                self._take_plan(name, record, known)
        nodes = {worker.node_id for worker in self._cluster.view.workers.values()}
        for following in self._following.values():
            gears, _ = on_nodes(following.plan, nodes)
            if gears != following.gears:
                _log.warning("other gears", extra={"deployment": following.record.name})
                following.gears = gears

    def _take_plan(
        self, name: DeploymentName, record: GearPlanRecord, known: _Following | None
    ) -> None:
        """Follow a plan from its lowest gear on, with the rate that the one before it saw."""
        try:
            plan = parse_plan(record.content)
        except GearfallError as error:
            if self._refused.get(name) != record:
                self._refused[name] = record
                extra = {"deployment": name, "error": error.message}
                _log.warning("a gear plan can't be followed", extra=extra)
            return
        state = GearState(0, self._clock(), known.state.rate if known else 0.0)
        self._following[name] = following = _Following(record, plan, state)
        if known is not None:
            following.answer_tokens, following.answers = known.answer_tokens, known.answers
        _log.info("follows a gear plan", extra={"deployment": name, "version": plan.version})

    async def _sample_for_ever(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            for following in tuple(self._following.values()):
                self._sample(following)
                if not following.is_telling and self._news(following) is not None:
                    following.is_telling = True
                    tasks.create_task(self._tell(following))

    def _sample(self, following: _Following) -> None:
        now_s = self._clock()
        others = self._others(following)
        age_s = max(0.0, now_s - following.state.at_s)
        arrived = following.arrived_tokens + age_s * sum(each.tokens_per_s for each in others)
        here = self._queued(following)
        queued = here.total + sum(each.queued_tokens for each in others)
        following.arrived_tokens = 0.0
        sample = LoadSample(now_s, arrived, queued, self._kv_share(following))
        after = shift(following.state, sample, following.gears, self._policy)
        if after.gear != following.state.gear:
            following.shifts += 1
            _log.info(
                "wants another gear",
                extra={
                    "deployment": following.record.name,
                    "gear": after.gear,
                    "tokens_per_s": round(after.rate, 1),
                    "queued_tokens": round(queued, 1),
                    "queued_prompt_tokens": round(here.prompt, 1),
                    "kv_share": sample.kv_share,
                },
            )
        following.state = after

    def _queued(self, following: _Following) -> _Queued:
        """Add up prompts as long as they are, and answers as long as this deployment's lately."""
        waiting, prompt, answer = self._waiting(), 0, 0.0
        for host in {self._cluster.view.host_of(model) for model in following.models}:
            backlog = waiting.get(host, Backlog())
            prompt += backlog.prompt_tokens
            answer += min(backlog.jobs * following.answer_tokens, backlog.output_tokens)
        return _Queued(prompt, answer)

    def _kv_share(self, following: _Following) -> float:
        """Return the share of the fullest replica of the gear in force."""
        stages = following.gears[self._in_force(following)].stages
        models = {self._cluster.view.host_of(stage.model) for stage in stages}
        shares = (
            replica.kv_share
            for replica in self._cluster.view.replicas.values()
            if replica.model in models and replica.state is ReplicaState.READY
        )
        return max(shares, default=0.0)

    def _news(self, following: _Following) -> GearVoteRecord | None:
        """Return this router's vote when it is another than the one that stands."""
        others = self._others(following)
        own_rate = max(0.0, following.state.rate - sum(each.tokens_per_s for each in others))
        queued = self._queued(following)
        vote = GearVoteRecord(
            following.record.name,
            self._router_id,
            following.plan.version,
            following.state.gear,
            own_rate,
            queued.total,
        )
        return vote if self._lease is not None and _is_news(following.told, vote) else None

    async def _tell(self, following: _Following) -> None:
        """Write votes until the newest stands; after a failure the next sample tries again."""
        try:
            while (vote := self._news(following)) is not None and self._lease is not None:
                following.told = vote
                await self._cluster.put_gear_vote(vote, lease=self._lease)
        except GearfallError as error:
            following.told = None
            _log.warning("could not write a gear vote", extra={"error": error.message})
        finally:
            following.is_telling = False

    def _others(self, following: _Following) -> tuple[GearVoteRecord, ...]:
        return tuple(
            vote
            for (name, router_id), vote in self._cluster.view.gear_votes.items()
            if name == following.record.name
            and router_id != self._router_id
            and vote.version == following.plan.version
        )

    def _in_force(self, following: _Following) -> int:
        gears = len(following.gears)
        others = highest_vote(self._others(following), following.plan.version, gears)
        return max(min(following.state.gear, gears - 1), others)


def _is_news(told: GearVoteRecord | None, vote: GearVoteRecord) -> bool:
    if told is None or (told.version, told.gear) != (vote.version, vote.gear):
        return True
    before, now = told.tokens_per_s + told.queued_tokens, vote.tokens_per_s + vote.queued_tokens
    return abs(now - before) > _WORTH_TELLING * max(before, now, 1.0)
