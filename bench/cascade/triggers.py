"""Where a trigger pays, simulated: `python -m bench.cascade triggers`.

Two nodes of one worker each, Poisson arrivals, loads from a tenth of what they can do one job at a
time. What counts is the p95 of whole answers over that without a trigger, the wait bounded by a
tenth of that p95 as workers do.

    alone   one model; steps cost from nothing to half as much again for each job beside the first
    shared  a small model and a larger one on the same core, as on one accelerator; a step costs
            the same for 1 job and for 16, or half as much again
`python -m bench.cascade claims` measures the first on a real cluster.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import median

from rich.console import Console

from bench.measuring.machine import machine_facts, our_versions
from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.gears.plan_build import TRIGGERS, WORTH
from gearfall.simulation.cascades.answers import Answer, Query
from gearfall.simulation.cascades.cascade_outcomes import Arrival
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.cascades.step_engine import StepSpeed
from gearfall.simulation.fleet.figures import quantile

RESULTS = Path(__file__).parents[1] / "results" / "cascade_triggers.json"
SMALL, LARGE = ModelName("small"), ModelName("large")
NODES = ("a", "b")
TOKENS, SLOTS, REQUESTS, QUERIES = 16, 16, 400, 20
SMALL_STEP_S = 0.01
ALONE_S = ((0.01, 0.01), (0.01, 0.02), (0.01, 0.08), (0.002, 0.01))
"""Of a step with one job and with all slots taken."""
ALONE_LOADS = (0.1, 0.3, 0.5, 0.7, 0.85)
"""Of what full batches can do."""
SHARED = tuple(product((1.0, 1.5), (4.0, 10.0), (0.1, 0.3)))
"""Step of a full batch over that of one job, step of the large model over the small one's, share of
the answers that go up."""
SHARED_LOADS = (0.3, 0.6, 1.2, 2.4)
"""Of what one job at a time can do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing to replay."""

    name: str
    """alone or shared."""
    per_s: float
    speeds: tuple[StepSpeed, ...]
    """Of the small model, and of the large one where there is one."""
    goes_up: float = 0.0

    def p95_s(self, seed: int, triggers: Mapping[str, int], promised_s: float) -> float:
        """Return the p95 of whole answers."""
        stages = (Stage(SMALL, 0.5), Stage(LARGE)) if len(self.speeds) > 1 else (Stage(SMALL),)
        promise = Promise(0.9, 0.0, 0.1, 0, 1.0, promised_s, (1.0, self.goes_up)[: len(stages)])
        gear = Gear(1e9, stages, promise, triggers=dict(triggers))
        replicas = [
            FixedReplica(stage.model, node, speed, SLOTS, node)
            for node in NODES
            for stage, speed in zip(stages, self.speeds, strict=True)
        ]
        run = run_cascades(replicas, self._queries(), self._arrivals(seed), [gear])
        return quantile([each.total_s for each in run.answered], 0.95)

    def _queries(self) -> list[Query]:
        sure = round(QUERIES * (1.0 - self.goes_up))
        large = Answer(20, TOKENS, 1.0, 1.0, 1.0)
        return [
            {SMALL: Answer(20, TOKENS, float(at < sure), 1.0, 1.0), LARGE: large}
            for at in range(QUERIES)
        ]

    def _arrivals(self, seed: int) -> list[Arrival]:
        draw, at_s, found = Random(seed), 0.0, []
        for _ in range(REQUESTS):
            at_s += draw.expovariate(self.per_s)
            found.append(Arrival(at_s, draw.randrange(QUERIES)))
        return found


def settings() -> Iterator[Setting]:
    """Return all that is replayed."""
    for (one_s, full_s), load in product(ALONE_S, ALONE_LOADS):
        per_s = load * len(NODES) * SLOTS / (TOKENS * full_s)
        yield Setting("alone", per_s, (_speed(one_s, full_s),))
    for (widening, ratio, goes_up), load in product(SHARED, SHARED_LOADS):
        per_s = load * len(NODES) / (TOKENS * SMALL_STEP_S * (1.0 + goes_up * ratio))
        speeds = tuple(
            _speed(each, each * widening) for each in (SMALL_STEP_S, SMALL_STEP_S * ratio)
        )
        yield Setting("shared", per_s, speeds, goes_up)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.cascade triggers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(argv)
    ratios: dict[str, dict[str, list[float]]] = {}
    for setting in settings():
        stages = (SMALL, LARGE)[: len(setting.speeds)]
        for seed in range(chosen.seeds):
            plain_s = setting.p95_s(seed, {}, 0.0)
            for stage, trigger in product(stages, TRIGGERS):
                ratio = setting.p95_s(seed, {str(stage): trigger}, plain_s) / plain_s
                name = f"{setting.name}, {stage} in {trigger}s"
                ratios.setdefault(name, {}).setdefault(_words(setting), []).append(ratio)
    for name, by_setting in ratios.items():
        _print(name, by_setting)
    document = {"machine": machine_facts(), "versions": our_versions(), "p95_ratios": ratios}
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(document, indent=1))


def _print(name: str, by_setting: Mapping[str, Sequence[float]]) -> None:
    """Say how often a trigger pays, and where most."""
    middles = {words: median(found) for words, found in by_setting.items()}
    worth = [words for words, ratio in middles.items() if ratio < WORTH]
    best = min(middles, key=lambda words: middles[words])
    Console().print(
        f"{name}: worth it in {len(worth)} of {len(middles)} settings; p95 {middles[best]:.2f} to "
        f"{max(middles.values()):.2f} of that without; least with {best}",
        highlight=False,
    )


def _words(setting: Setting) -> str:
    steps = [
        f"{speed.step_s(1) * 1e3:g} to {speed.step_s(SLOTS) * 1e3:g} ms" for speed in setting.speeds
    ]
    up = f", {setting.goes_up:.0%} go up" if setting.goes_up else ""
    return f"steps of {' and '.join(steps)}{up}, {setting.per_s:.1f}/s"


def _speed(one_s: float, full_s: float) -> StepSpeed:
    return StepSpeed(((1, one_s), (SLOTS, full_s)), one_s / 10)


if __name__ == "__main__":
    main()
