"""What the simulator says of a run of `bench.cascade real`, from the profile and the arrivals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from bench.cascade.real_figures import Outcome, Part, Run
from bench.cascade.real_served import Slowness
from bench.cascade.real_work import Window
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas
from gearfall.core.gears.gear_shift import ShiftPolicy
from gearfall.core.ids import ModelName
from gearfall.core.profile import Profile
from gearfall.gears.profile_answers import beginnings
from gearfall.simulation.cascades.answers import Query
from gearfall.simulation.cascades.cascade_outcomes import Arrival
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.plan_latency import tokens_per_s
from gearfall.simulation.cascades.profile_plan import mean_tokens, queries_of, served_on
from gearfall.simulation.cascades.seats import FixedReplica

DEVICE = "cpu"
AS_PROFILED: Mapping[str, Slowness] = {}
SHADOW_SHARE = 0.01
"""Of deployments that follow a plan and do not say."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """Replays in simulated time what the real cluster is asked, with the profile's queries."""

    profile: Profile
    workers: int

    def predict(
        self,
        plan: GearPlan,
        window: Window,
        per_s: float,
        duration_s: float,
        system: str = "",
        *,
        slowness: Mapping[str, Slowness] = AS_PROFILED,
    ) -> Run:
        """Return a run of a plan with every model on every worker, as slow as each is then."""
        queries = self.queries(plan)
        prompts = [each.prompt_tokens for each in self.profile.models[0].generations]
        asks = window.asks(per_s, duration_s, prompts)
        arrivals = [Arrival(ask.at_s, ask.question) for ask in asks]
        policy = ShiftPolicy() if len(plan.gears) > 1 else None
        run = run_cascades(
            self.replicas(),
            queries,
            arrivals,
            plan.gears,
            policy=policy,
            shadow_share=SHADOW_SHARE,
            hold_tokens=plan.hold_tokens,
            slowness=slowness,
            is_whole=True,
        )
        by_time = sorted(run.answered, key=lambda each: each.at_s)
        outcomes = tuple(
            Outcome(
                each.at_s, ask.question, each.total_s, each.quality, each.cost, each.stages, "",
                each.gear,
                queued_s=sum(stage.queued_s for stage in each.times),
                engine_s=sum(stage.engine_s for stage in each.times),
                parts=tuple(
                    Part(stage.model, stage.queued_s, stage.engine_s) for stage in each.times
                ),
            )
            for each, ask in zip(by_time, asks, strict=True)
        )  # fmt: skip
        return Run(system or plan.name, 0, outcomes, run.device_s)

    def replicas(self) -> Sequence[FixedReplica]:
        """Return one of each model on each worker."""
        found = []
        for model in self.profile.models:
            served = served_on(model, {DEVICE})[DEVICE]
            for number in range(self.workers):
                name = node_name(number)
                replica = FixedReplica(
                    ModelName(model.name), name, served.speed, served.slots, name
                )
                found.append(replica)
        return found

    def alone_s(self, model: str) -> float:
        """Return the mean time of an answer when nothing else is asked."""
        found = self.profile.model(model)
        speed = served_on(found, {DEVICE})[DEVICE].speed
        spent = [
            speed.request_s
            + speed.job_s
            + speed.step_s(each.prompt_tokens)
            + (each.output_tokens - 1) * speed.step_s(1)
            for each in found.generations
        ]
        return sum(spent) / len(spent)

    def capacity_per_s(self, model: str) -> float:
        """Return the requests a second that it can serve on all workers."""
        found = self.profile.model(model)
        prompts = fmean(each.prompt_tokens for each in found.generations)
        outputs = fmean(each.output_tokens for each in found.generations)
        served = served_on(found, {DEVICE})[DEVICE]
        return self.workers * tokens_per_s(served, prompts, outputs) / (prompts + outputs)

    def tokens(self, model: str) -> float:
        """Return the mean tokens of a request there."""
        return mean_tokens(self.profile.model(model))

    def queries(self, plan: GearPlan) -> Sequence[Query]:
        """Return what the models answered, as certain as a plan measures it."""
        judged = beginnings(self.profile, plan.hold_tokens)
        return queries_of(judged, plan.calibrations, plan.certainty)


def node_name(number: int) -> str:
    """Return a node's name in a local cluster; the first is number 0."""
    return f"node-{number + 1}"


def placed_everywhere(models: Sequence[str], workers: int) -> tuple[PlacedReplicas, ...]:
    """Return one replica of each model on each node."""
    nodes = [node_name(number) for number in range(workers)]
    return tuple(PlacedReplicas(node, model, 1) for node in nodes for model in models)


def one_gear(plan: GearPlan, name: str, gear: Gear) -> GearPlan:
    """Return a plan that stays in one gear of another."""
    return GearPlan(
        name=name,
        version=1,
        made_unix_s=plan.made_unix_s,
        target=f"always {gear.stages[0].model} first",
        cost_unit=plan.cost_unit,
        models={stage.model: plan.models[stage.model] for stage in gear.stages},
        gears=(gear,),
        placement=plan.placement,
        certainty=plan.certainty,
        calibrations={
            name: each
            for name, each in plan.calibrations.items()
            if name in {stage.model for stage in gear.stages[:-1]}
        },
    )
