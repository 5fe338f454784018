"""The systems that `bench.cascade real` compares, each a gear plan of the same models.

| system       | its plan                                                                      |
| ------------ | ----------------------------------------------------------------------------- |
| ours         | `gearfall plan --p95`: a cascade for each load, quality falls before p95 does |
| static       | `gearfall plan --loss`: the cheapest cascade that certifiably loses so little |
| always large | the largest model                                                             |
| one model    | the best single model whose p95 holds at the highest load, batches tuned      |
| switching    | for each load the best single model whose p95 holds there, batches tuned      |

One model with dynamic batching and switching between models without cascades (MS+) are what
CascadeServe (arXiv 2406.14424) compares itself with; both are chosen here by the same simulator,
profile, target and loads as ours.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cascade.real_cluster import RealCluster
from bench.cascade.real_console import console
from bench.cascade.real_prediction import Predictor, one_gear, placed_everywhere
from gearfall.core.errors import Internal
from gearfall.core.gears.gear_plan import Gear, GearPlan, Promise
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.gears.plan_build import TRIGGERS
from gearfall.simulation.cascades.plan_latency import PlanLatency
from gearfall.simulation.fleet.figures import quantile

OURS, STATIC, LARGE, ONE, SWITCHING = "ours", "static", "always-large", "one-model", "switching"
SYSTEMS = (OURS, STATIC, LARGE, ONE, SWITCHING)
LOSSES = (0.02, 0.03, 0.04, 0.06)
"""Right answers that the static cascade may lose, certified: the first that allows one."""
DELTA = 0.05
"""Chance that the certificate of the static cascade is wrong."""
REQUESTS = 400
"""Simulated for each gear."""
CV = 1.2
"""Of the gaps between arrivals that are planned for: those of the thinned trace."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What all plans are made for."""

    p95_s: float
    loads: tuple[float, ...]
    """Tokens a second, rising."""


async def gearfall(cluster: RealCluster, *arguments: object) -> None:
    """Run the command as a user does. Raises Internal with what it said when it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gearfall.cli", *map(str, arguments), "--json"),
        env=os.environ | {"GEARFALL_SERVER": cluster.address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode != 0:
        raise Internal(f"gearfall {arguments[0]} failed: {said.decode()[-2000:]}")


async def make_plans(
    cluster: RealCluster, profile_path: Path, predictor: Predictor, wanted: Wanted
) -> dict[str, GearPlan]:
    """Return every system's plan by name."""
    ours = await _ours(cluster, profile_path, wanted)
    static = await _frugal(cluster, profile_path, wanted)
    singles = Singles(predictor, ours)
    best_first = sorted(predictor.profile.models, key=lambda each: -_quality(each.name, predictor))
    names, largest = [each.name for each in best_first], predictor.profile.models[-1].name
    switching = tuple(singles.best(names, load, wanted.p95_s) for load in wanted.loads)
    return {
        OURS: ours,
        STATIC: one_gear(static, STATIC, static.gears[0]),
        LARGE: singles.plan(LARGE, (singles.gear(largest, wanted.loads[-1]),)),
        ONE: singles.plan(ONE, (switching[-1],)),
        SWITCHING: singles.plan(SWITCHING, switching),
    }


async def _ours(cluster: RealCluster, profile_path: Path, wanted: Wanted) -> GearPlan:
    """Return the plan for the latency target, for all loads that can be served in it."""
    out, loads = profile_path.with_name(f"{OURS}.json"), list(wanted.loads)
    while True:
        try:
            await gearfall(
                cluster, "plan", profile_path, "--name", OURS, "--p95", wanted.p95_s,
                *(part for load in loads for part in ("--load", load)),
                "--cv", CV, "--requests", REQUESTS, "--out", out,
            )  # fmt: skip
        except Internal as error:
            if len(loads) == 1:
                raise
            console.print(f"without {loads.pop():.0f} tokens/s: {error.message}", highlight=False)
        else:
            return parse_plan(out.read_bytes())


async def _frugal(cluster: RealCluster, profile_path: Path, wanted: Wanted) -> GearPlan:
    """Return the plan for the smallest loss that the queries certify for more than one stage."""
    out = profile_path.with_name(f"{STATIC}.json")
    plan = None
    for loss in LOSSES:
        try:
            await gearfall(
                cluster, "plan", profile_path, "--name", STATIC, *certified(loss),
                "--load", wanted.loads[0], "--cv", CV, "--requests", REQUESTS, "--out", out,
            )  # fmt: skip
        except Internal as error:
            if loss == LOSSES[-1] and plan is None:
                raise
            console.print(f"no plan for a loss of {loss:g}: {error.message}", highlight=False)
            continue
        plan = parse_plan(out.read_bytes())
        if len(plan.gears[0].stages) > 1:
            break
    assert plan is not None, "the last error was raised"
    return plan


def certified(loss: float) -> tuple[object, ...]:
    """Return what asks for one of LOSSES: tried on the same queries, they share the delta."""
    return ("--loss", loss, "--delta", DELTA / len(LOSSES))


def _quality(model: str, predictor: Predictor) -> float:
    found = predictor.profile.model(model).generations
    return sum(each.quality for each in found) / len(found)


@dataclass(frozen=True, slots=True)
class Singles:
    """Plans of gears that are one model each."""

    predictor: Predictor
    like: GearPlan
    """For what all plans of this cluster share."""

    def plan(self, name: str, gears: Sequence[Gear]) -> GearPlan:
        """Return the plan of these gears, every model on every node."""
        models = {stage.model for gear in gears for stage in gear.stages}
        digests = {each.name: each.digest for each in self.predictor.profile.models}
        return replace(
            self.like,
            name=name,
            target=f"{name}, to be compared with",
            models={model: digests[model] for model in sorted(models)},
            gears=tuple(gears),
            placement=placed_everywhere(sorted(models), self.predictor.workers),
            variants=(),
            calibrations={},
        )

    def gear(self, model: str, load: float) -> Gear:
        """Return a model alone, up to a load in tokens a second."""
        found = self.predictor.profile.model(model).generations
        cost = sum(each.cost for each in found) / len(found)
        promise = Promise(_quality(model, self.predictor), 0.0, 0.05, 0, cost, 0.0, (1.0,))
        return Gear(load, (Stage(ModelName(model)),), promise)

    def best(self, names: Sequence[str], load: float, p95_s: float) -> Gear:
        """Return the best model whose p95 holds with its best trigger; the last if none's does."""
        for name in names[:-1]:
            gear = self.tuned(self.gear(name, load))
            if gear.promise.p95_s <= p95_s:
                return gear
        return self.tuned(self.gear(names[-1], load))

    def tuned(self, gear: Gear) -> Gear:
        """Return the gear with the trigger that answers soonest, promising that p95."""
        model = gear.stages[0].model
        gear = replace(gear, promise=replace(gear.promise, p95_s=self._p95_s(gear)))
        tried = [replace(gear, triggers={model: each}) for each in (1, *TRIGGERS)]
        p95s_s = [self._p95_s(each) for each in tried]
        best_s = min(p95s_s)
        best = tried[p95s_s.index(best_s)]
        return replace(best, promise=replace(best.promise, p95_s=best_s))

    def _p95_s(self, gear: Gear) -> float:
        predictor = self.predictor
        latency = PlanLatency(
            predictor.queries(self.like),
            {},
            {gear.stages[0].model: predictor.tokens(gear.stages[0].model)},
            requests=REQUESTS,
            cv=CV,
        )
        run = latency.replay_on(gear, predictor.replicas())
        return quantile([each.total_s for each in run.answered], 0.95)
