"""Builds a gear plan: cascades for each level of load, one placement, promises, a plan for N - 1.

The sub-problems correct each other until they agree, as in CascadeServe (arXiv 2406.14424): every
level begins with the best cascade; where the placement says that its load can't be served, or the
simulation that it is too slow, that level takes the next cheaper cascade, and all is placed anew.
A level never has a better cascade than a lower one: quality falls with load, if at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gearfall.core.calibration import Calibration
from gearfall.core.errors import InvalidRequest
from gearfall.core.gear_plan import Gear, GearPlan, Promise, Variant
from gearfall.gears.answers import ModelAnswers, check_answers
from gearfall.gears.certificate import lower_bound
from gearfall.gears.choice import LEARN_SHARE, thinned
from gearfall.gears.placement import Host, Placeable, Placement, place_models
from gearfall.gears.search import Cascade, evaluate, front, replay

MAX_CASCADES = 12
"""Rungs between the best cascade and the cheapest."""
MAX_UTILISATION = 0.9
MAX_ROUNDS = 200
TRIGGERS = (1, 2, 4, 8)

Latency = Callable[[Gear, Placement, Sequence[Host]], float]
"""The simulator: p95 in seconds of whole answers at the gear's highest load."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan has to keep; the other one is made as good as it can be."""

    quality: float | None = None
    """Certified share of right answers at every load."""
    p95_s: float | None = None
    """Of whole answers, at every load."""
    delta: float = 0.05

    def words(self) -> str:
        """Return it as the plan's file says it."""
        parts = []
        if self.quality is not None:
            parts.append(f"quality >= {self.quality:g} with delta {self.delta:g}")
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


@dataclass(frozen=True, slots=True)
class _Rung:
    """One cascade with what is known of it on the testing queries."""

    cascade: Cascade
    bound: float
    queries: int


def build_plan(inputs: PlanInputs, latency: Latency) -> GearPlan:
    """Return the plan. Raises InvalidRequest for a target out of reach, saying by how much."""
    rungs = _rungs(inputs)
    gears, placement = _Build(inputs, rungs, inputs.hosts, latency).run()
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
        assumptions=(*inputs.assumptions, *missing),
        variants=variants,
        certainty=inputs.certainty,
        calibrations=dict(inputs.calibrations or {}),
    )


def _rungs(inputs: PlanInputs) -> tuple[_Rung, ...]:
    """Return the cascades to choose from, best first; all their bounds hold together."""
    if list(inputs.loads) != sorted(set(inputs.loads)) or not inputs.loads or inputs.loads[0] <= 0:
        raise InvalidRequest(f"loads {list(inputs.loads)}: rising, above 0", param="loads")
    models = check_answers(inputs.answers)
    learning = int(len(inputs.order) * LEARN_SHARE)
    learn = [each.take(inputs.order[:learning]) for each in models]
    test = {each.model: each.take(inputs.order[learning:]) for each in models}
    path = thinned(front(learn), MAX_CASCADES)
    found = []
    for cascade in path:
        chosen = [test[stage.model] for stage in cascade.stages]
        limits = [stage.threshold for stage in cascade.stages if stage.threshold is not None]
        quality = replay(chosen, limits)[1]
        bound = lower_bound(quality, inputs.target.delta / len(path))
        found.append(_Rung(evaluate(chosen, limits), bound, len(quality)))
    wanted = inputs.target.quality
    kept = tuple(each for each in found if wanted is None or each.bound >= wanted)
    if not kept:
        best = max(each.bound for each in found)
        raise InvalidRequest(
            f"{found[0].queries} queries certify a quality of {best:.4f} at most with delta "
            f"{inputs.target.delta:g}, not {wanted:g}. Lower the target, allow a larger delta, or "
            "measure more queries",
            param="quality",
        )
    return kept


@dataclass(slots=True)
class _Build:
    """Owner of one search: which rung each level of load stands on."""

    inputs: PlanInputs
    rungs: Sequence[_Rung]
    hosts: Sequence[Host]
    latency: Latency

    def run(self) -> tuple[tuple[Gear, ...], Placement]:
        """Return gears and placement that agree."""
        places = [0] * len(self.inputs.loads)
        for _ in range(MAX_ROUNDS):
            gears = tuple(self._gear(*each) for each in zip(self.inputs.loads, places, strict=True))
            try:
                placement = self._place(gears)
            except InvalidRequest as error:
                places = self._lowered(places, 0, error.message)
                continue
            gears = tuple(
                replace(gear, shares={model: dict(by) for model, by in shares.items()})
                for gear, shares in zip(gears, placement.shares, strict=True)
            )
            level, why = self._first_that_fails(gears, placement)
            if level is None:
                return tuple(self._promised(gear, placement) for gear in gears), placement
            places = self._lowered(places, level, why)
        raise InvalidRequest(f"the plan did not settle in {MAX_ROUNDS} rounds: plan fewer loads")

    def _lowered(self, places: Sequence[int], level: int, why: str) -> list[int]:
        """Put a level, and those above it that stood as high, one rung down."""
        rung = places[level] + 1
        if rung == len(self.rungs):
            raise InvalidRequest(
                f"a load of {self.inputs.loads[level]:g} tokens/s is out of reach: with the "
                f"cheapest cascade that may be used {why}. Lower the load, relax the target, or "
                "add workers",
                param="loads",
            )
        return [max(place, rung) if at >= level else place for at, place in enumerate(places)]

    def _gear(self, load: float, place: int) -> Gear:
        rung = self.rungs[place]
        promise = Promise(
            quality=rung.cascade.quality,
            quality_bound=rung.bound,
            delta=self.inputs.target.delta,
            queries=rung.queries,
            cost=rung.cascade.cost,
            p95_s=0.0,
            escalated=rung.cascade.reached,
        )
        return Gear(load, rung.cascade.stages, promise)

    def _place(self, gears: Sequence[Gear]) -> Placement:
        used = {stage.model for gear in gears for stage in gear.stages}
        models = [each for each in self.inputs.models if each.name in used]
        return place_models(self.hosts, models, [self._demand(gear) for gear in gears])

    def _demand(self, gear: Gear) -> dict[str, float]:
        """Tokens a second of each model when requests come at the gear's highest load."""
        per_request = self.inputs.tokens[gear.stages[0].model]
        requests_per_s = gear.max_load / per_request
        return {
            stage.model: requests_per_s * reached * self.inputs.tokens[stage.model]
            for stage, reached in zip(gear.stages, gear.promise.escalated, strict=True)
        }

    def _first_that_fails(
        self, gears: Sequence[Gear], placement: Placement
    ) -> tuple[int | None, str]:
        """Return the lowest level that does not hold, and why."""
        for level, utilisation in enumerate(placement.utilisation):
            if utilisation > MAX_UTILISATION:
                return level, f"the busiest worker would be used {utilisation:.2f} times"
        wanted_s = self.inputs.target.p95_s
        if wanted_s is None:
            return None, ""
        for level, gear in enumerate(gears):
            p95_s = self.latency(gear, placement, self.hosts)
            if p95_s > wanted_s:
                return level, f"p95 is {p95_s:.3f} s"
        return None, ""

    def _promised(self, gear: Gear, placement: Placement) -> Gear:
        """Return the gear with the triggers that answer soonest, and the p95 they give."""
        plain_s = self.latency(gear, placement, self.hosts)
        best, best_s = gear, plain_s
        for trigger in TRIGGERS[1:]:
            tried = replace(gear, triggers={gear.stages[0].model: trigger})
            p95_s = self.latency(tried, placement, self.hosts)
            # A trigger holds answers back: it has to be worth that.
            if p95_s < 0.98 * best_s:
                best, best_s = tried, p95_s
        return replace(best, promise=replace(best.promise, p95_s=best_s))


def _variants(
    inputs: PlanInputs, rungs: Sequence[_Rung], latency: Latency
) -> tuple[tuple[Variant, ...], tuple[str, ...]]:
    """Return a plan for each node lost; for those that can't be had, a line that says why."""
    nodes = sorted({host.node for host in inputs.hosts})
    variants, missing = [], []
    for lost in nodes if len(nodes) > 1 else ():
        left = [host for host in inputs.hosts if host.node != lost]
        try:
            gears, placement = _Build(inputs, rungs, left, latency).run()
        except InvalidRequest as error:
            missing.append(f"without node {lost} this plan can't be kept: {error.message}")
            continue
        variants.append(Variant(lost, gears, placement.replicas))
    return tuple(variants), tuple(missing)
