"""Whether a trigger ever pays, simulated: `python -m bench.cascade triggers`.

Two replicas of one model, engines whose step costs from nothing to half as much again for each job
beside the first, at loads from a tenth to 85 % of what they can do, Poisson arrivals. Each load
is replayed with each trigger; what counts is the p95 of whole answers over that without one.
`python -m bench.cascade claims` measures the same on a real cluster.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from rich.console import Console

from bench.machine import machine_facts, our_versions
from gearfall.core.gear_plan import Gear, Promise
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from gearfall.gears.plan_build import TRIGGERS, WORTH
from gearfall.simulation.answers import Answer
from gearfall.simulation.cascade_run import Arrival, FixedReplica, run_cascades
from gearfall.simulation.step_engine import StepSpeed

RESULTS = Path(__file__).parents[1] / "results" / "cascade_triggers.json"
MODEL = ModelName("m")
TOKENS, SLOTS, REQUESTS = 16, 16, 600
STEPS_S = ((0.01, 0.01), (0.01, 0.02), (0.01, 0.08), (0.002, 0.01))
"""Of a step with one job and with all slots taken."""
LOADS = (0.1, 0.3, 0.5, 0.7, 0.85)
_PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,))


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate, print, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.cascade triggers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    ratios: dict[int, list[float]] = {trigger: [] for trigger in TRIGGERS}
    for steps_s in STEPS_S:
        for load in LOADS:
            for seed in range(settings.seeds):
                arrivals = _arrivals(load * 2 * SLOTS / (TOKENS * steps_s[1]), seed)
                plain_s = _p95_s(steps_s, arrivals, 1)
                for trigger, found in ratios.items():
                    found.append(_p95_s(steps_s, arrivals, trigger) / plain_s)
    for trigger, found in ratios.items():
        found.sort()
        worth = sum(ratio < WORTH for ratio in found)
        Console().print(
            f"trigger {trigger}: p95 {found[0]:.3f} to {found[-1]:.3f} of that without, median "
            f"{found[len(found) // 2]:.3f}, over {len(found)} loads; worth it in {worth}",
            highlight=False,
        )
    document = {"machine": machine_facts(), "versions": our_versions(), "p95_ratios": ratios}
    settings.out.parent.mkdir(exist_ok=True)
    settings.out.write_text(json.dumps(document, indent=1))


def _arrivals(rate: float, seed: int) -> list[Arrival]:
    draw, at_s, found = Random(seed), 0.0, []
    for _ in range(REQUESTS):
        at_s += draw.expovariate(rate)
        found.append(Arrival(at_s, 0))
    return found


def _p95_s(steps_s: tuple[float, float], arrivals: Sequence[Arrival], trigger: int) -> float:
    speed = StepSpeed(((1, steps_s[0]), (SLOTS, steps_s[1])), steps_s[0] / 10)
    gear = Gear(1e9, (Stage(MODEL),), _PROMISE, triggers={str(MODEL): trigger})
    replicas = [FixedReplica(MODEL, node, speed, SLOTS) for node in ("a", "b")]
    answer = {MODEL: Answer(20, TOKENS, 0.9, 1.0, 1.0)}
    answered = run_cascades(replicas, [answer], arrivals, [gear]).answered
    return sorted(each.total_s for each in answered)[int(0.95 * len(answered))]


if __name__ == "__main__":
    main()
