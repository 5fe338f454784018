"""Builds a gear plan: cascades for each level of load, one placement, promises, a plan for N - 1.

The sub-problems hand their errors to each other until they agree, as in CascadeServe
(arXiv 2406.14424): cascades -> levels of load -> placement -> batch triggers, and back.

| who       | finds                                 | error, and who answers it                    |
| --------- | ------------------------------------- | -------------------------------------------- |
| rungs     | cascades that keep the quality        | none does: the plan is refused               |
| levels    | a cascade for each load, as liked     | none is left: the plan is refused            |
| placement | replicas and shares, all levels' ones | no room, or a worker used too much: levels   |
| triggers  | batch triggers, by the simulator      | p95 missed with the best of them: levels     |

Whoever errs names the lowest level that it could not serve; that level takes the next cascade of
its liking, and all is placed and tuned anew. The search ends when nobody errs, or when a level has
no cascade left: every round takes one away, so that it ends. With a target for latency or none, the
best cascade is liked most, and a level never has a better one than a lower level. With a target of
quality alone it is the cheapest at the level's load, starts of models that went away included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import Gear, GearPlan, Promise, Variant
from gearfall.gears.answers import ModelAnswers
from gearfall.gears.placement import Host, Placeable, Placement, place_models
from gearfall.gears.rungs import QualityTarget, Rung, find_rungs
from gearfall.gears.starts import ALWAYS_WARM, Warmth

MAX_UTILISATION = 0.9
TRIGGERS = (2, 4, 8)
WORTH = 0.98
"""A trigger holds answers back: p95 has to fall below this share of what it was without."""

Latency = Callable[[Gear, Placement, Sequence[Host]], float]
"""The simulator: p95 in seconds of whole answers at the gear's highest load."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan has to keep. Without a p95 and with a target of quality it is made cheap, else as
    good as the load allows."""

    quality: float | None = None
    """Certified share of right answers at every load."""
    loss: float | None = None
    """Quality that may be lost against the best model at every load, certified."""
    p95_s: float | None = None
    """Of whole answers, at every load."""
    delta: float = 0.05

    @property
    def is_cheap(self) -> bool:
        """Whether of two cascades that will do the cheaper is liked more."""
        return self.p95_s is None and (self.quality is not None or self.loss is not None)

    def words(self) -> str:
        """Return it as the plan's file says it."""
        parts = []
        if self.quality is not None:
            parts.append(f"quality >= {self.quality:g} with delta {self.delta:g}")
        if self.loss is not None:
            parts.append(f"loss <= {self.loss:g} with delta {self.delta:g}")
        if self.p95_s is not None:
            parts.append(f"p95 <= {self.p95_s:g} s")
        return " and ".join(parts) or "the best quality that the load allows"


@dataclass(frozen=True, slots=True, eq=False)
class PlanInputs:
    """All that a plan is made from."""

    name: str
    version: int
    made_unix_s: float
    target: Target
    loads: tuple[float, ...]
    """Highest load of each gear, tokens a second of arriving requests, rising."""
    answers: tuple[ModelAnswers, ...]
    tokens: Mapping[str, float]
    """By model: mean tokens of a request there, prompt and answer."""
    order: npt.NDArray[np.intp]
    """A random permutation of the queries; its first part chooses, the rest certifies."""
    models: tuple[Placeable, ...]
    hosts: tuple[Host, ...]
    digests: Mapping[str, str]
    cost_unit: str
    assumptions: tuple[str, ...] = ()
    calibrations: Mapping[str, Calibration] | None = None
    certainty: str = "sequence_probability"
    warmth: Warmth = ALWAYS_WARM
    may_drop_loads: bool = False
    """Loads are a guess: the highest ones that can't be served are left out."""


def build_plan(inputs: PlanInputs, latency: Latency) -> GearPlan:
    """Return the plan. Raises InvalidRequest for a target out of reach, saying by how much."""
    loads = inputs.loads
    if list(loads) != sorted(set(loads)) or not loads or loads[0] <= 0:
        raise InvalidRequest(f"loads {list(loads)}: rising, above 0", param="loads")
    wanted = QualityTarget(inputs.target.quality, inputs.target.loss, inputs.target.delta)
    rungs = find_rungs(inputs.answers, inputs.order, wanted)
    dropped: tuple[str, ...] = ()
    agreed = _Build(inputs, rungs, inputs.hosts, latency).run()
    while isinstance(agreed, _Failure):
        if not inputs.may_drop_loads or agreed.level == 0:
            raise InvalidRequest(agreed.why, param="loads")
        inputs = replace(inputs, loads=inputs.loads[: agreed.level])
        dropped = (f"no higher load than {inputs.loads[-1]:g} tokens/s: {agreed.why}",)
        agreed = _Build(inputs, rungs, inputs.hosts, latency).run()
    gears, placement = agreed
    variants, missing = _variants(inputs, rungs, latency)
    return GearPlan(
        name=inputs.name,
        version=inputs.version,
        made_unix_s=inputs.made_unix_s,
        target=inputs.target.words(),
        cost_unit=inputs.cost_unit,
        models=dict(inputs.digests),
        gears=gears,
        placement=placement.replicas,
        assumptions=(*inputs.assumptions, *dropped, *missing),
        variants=variants,
        certainty=inputs.certainty,
        calibrations=dict(inputs.calibrations or {}),
    )


@dataclass(frozen=True, slots=True)
class _Failure:
    """The lowest level that could not be served, and why."""

    level: int
    why: str


_Agreed = tuple[tuple[Gear, ...], Placement]


@dataclass(slots=True)
class _Build:
    """Owner of one search: which cascade each level of load has come to."""

    inputs: PlanInputs
    rungs: Sequence[Rung]
    hosts: Sequence[Host]
    latency: Latency

    def run(self) -> _Agreed | _Failure:
        """Return gears and placement that agree, or the level for which no cascade is left."""
        liked = [self._liked(load) for load in self.inputs.loads]
        places = [0] * len(liked)
        while True:
            gears = tuple(
                self._gear(load, order[place])
                for load, order, place in zip(self.inputs.loads, liked, places, strict=True)
            )
            found = self._agreed(gears)
            if not isinstance(found, _Failure):
                return found
            if places[found.level] + 1 == len(self.rungs):
                return self._out_of_reach(found)
            places = self._lowered(places, found.level)

    def _agreed(self, gears: Sequence[Gear]) -> _Agreed | _Failure:
        """Return the gears placed and tuned, or the first error on the way."""
        try:
            placement = self._place(gears)
        except InvalidRequest as error:
            return _Failure(self._without_room(gears), error.message)
        failure = self._overloaded(placement)
        if failure is not None:
            return failure
        tuned = self._tuned(gears, placement)
        return self._slow(tuned) or (tuned, placement)

    def _out_of_reach(self, failure: _Failure) -> _Failure:
        kind = "dearest" if self.inputs.target.is_cheap else "cheapest"
        return _Failure(
            failure.level,
            f"a load of {self.inputs.loads[failure.level]:g} tokens/s is out of reach: with the "
            f"{kind} cascade that may be used {failure.why}. Lower the load, relax the target, or "
            "add workers",
        )

    def _liked(self, load: float) -> tuple[Rung, ...]:
        """Return the cascades in the order in which a level tries them."""
        if not self.inputs.target.is_cheap:
            return tuple(self.rungs)
        costs = [each.cascade.cost + self._start_cost(each, load) for each in self.rungs]
        order = sorted(range(len(costs)), key=lambda at: (costs[at], at))
        return tuple(self.rungs[at] for at in order)

    def _lowered(self, places: Sequence[int], level: int) -> list[int]:
        """Let a level take its next cascade, and those above it that it would overtake."""
        place = places[level] + 1
        if self.inputs.target.is_cheap:
            return [place if at == level else each for at, each in enumerate(places)]
        return [max(each, place) if at >= level else each for at, each in enumerate(places)]

    def _gear(self, load: float, rung: Rung) -> Gear:
        start_cost = self._start_cost(rung, load)
        promise = Promise(
            quality=rung.cascade.quality,
            quality_bound=rung.bound,
            delta=self.inputs.target.delta,
            queries=rung.queries,
            cost=rung.cascade.cost + start_cost,
            p95_s=0.0,
            escalated=rung.cascade.reached,
            loss_bound=rung.loss_bound,
            start_cost=start_cost,
        )
        return Gear(load, rung.cascade.stages, promise)

    def _start_cost(self, rung: Rung, load: float) -> float:
        models = [stage.model for stage in rung.cascade.stages]
        requests_per_s = load / self.inputs.tokens[models[0]]
        return self.inputs.warmth.start_cost(models, rung.cascade.reached, requests_per_s)

    def _place(self, gears: Sequence[Gear]) -> Placement:
        used = {stage.model for gear in gears for stage in gear.stages}
        models = [each for each in self.inputs.models if each.name in used]
        return place_models(self.hosts, models, [self._demand(gear) for gear in gears])

    def _without_room(self, gears: Sequence[Gear]) -> int:
        """Return the lowest level whose models do not fit beside those of the levels below."""
        if not self.inputs.target.is_cheap:
            return 0  # All levels follow it down, until they share models.
        for level in range(len(gears)):
            try:
                self._place(gears[: level + 1])
            except InvalidRequest:
                return level
        raise AssertionError("all levels fit together")

    def _demand(self, gear: Gear) -> dict[str, float]:
        """Tokens a second of each model when requests come at the gear's highest load."""
        requests_per_s = gear.max_load / self.inputs.tokens[gear.stages[0].model]
        return {
            stage.model: requests_per_s * reached * answers * self.inputs.tokens[stage.model]
            for stage, reached, answers in zip(
                gear.stages, gear.promise.escalated, _asked_for(gear), strict=True
            )
        }

    def _overloaded(self, placement: Placement) -> _Failure | None:
        """Return the lowest level whose load does not fit the workers."""
        for level, utilisation in enumerate(placement.utilisation):
            if utilisation > MAX_UTILISATION:
                why = f"the busiest worker would be used {utilisation:.2f} times"
                return _Failure(level, why)
        return None

    def _tuned(self, gears: Sequence[Gear], placement: Placement) -> tuple[Gear, ...]:
        shared = (
            replace(gear, shares={model: dict(by) for model, by in shares.items()})
            for gear, shares in zip(gears, placement.shares, strict=True)
        )
        return tuple(self._with_triggers(gear, placement) for gear in shared)

    def _with_triggers(self, gear: Gear, placement: Placement) -> Gear:
        """Return the gear with the triggers that answer soonest, stage by stage, and its p95."""
        best, best_s = gear, self.latency(gear, placement, self.hosts)
        for stage in gear.stages:
            for trigger in TRIGGERS:
                tried = replace(
                    best,
                    triggers={**best.triggers, stage.model: trigger},
                    promise=replace(best.promise, p95_s=best_s),  # It bounds the wait.
                )
                p95_s = self.latency(tried, placement, self.hosts)
                if p95_s >= WORTH * best_s:
                    break  # What a smaller trigger did not gain, a larger one does not.
                best, best_s = tried, p95_s
        return replace(best, promise=replace(best.promise, p95_s=best_s))

    def _slow(self, gears: Sequence[Gear]) -> _Failure | None:
        """Return the lowest level that misses the p95 with its best triggers."""
        wanted_s = self.inputs.target.p95_s
        for level, gear in enumerate(gears):
            if wanted_s is not None and gear.promise.p95_s > wanted_s:
                return _Failure(level, f"p95 is {gear.promise.p95_s:.3f} s")
        return None


def _asked_for(gear: Gear) -> list[int]:
    """Return how many answers each stage asks for."""
    several = (stage.self_consistency for stage in gear.stages)
    return [1 if each is None else each.samples for each in several]


def _variants(
    inputs: PlanInputs, rungs: Sequence[Rung], latency: Latency
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """Return a plan for each node lost; for those that can't be had, a line that says why."""
    nodes = sorted({host.node for host in inputs.hosts})
    variants, missing = [], []
    for lost in nodes if len(nodes) > 1 else ():
        left = [host for host in inputs.hosts if host.node != lost]
        agreed = _Build(inputs, rungs, left, latency).run()
        if isinstance(agreed, _Failure):
            missing.append(f"without node {lost} this plan can't be kept: {agreed.why}")
            continue
        gears, placement = agreed
        variants.append(Variant(lost, gears, placement.replicas))
    return tuple(variants), tuple(missing)
