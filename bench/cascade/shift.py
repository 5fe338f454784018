"""What one gear decision costs: `python -m bench.cascade shift`.

A plan of several gears, a load that jumps at random; each decision is timed alone, with garbage
collection running as it does in a router.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.measuring.machine import machine_facts, our_versions
from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.gears.gear_shift import GearState, LoadSample, ShiftPolicy, shift
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage

RESULTS = Path(__file__).parents[1] / "results" / "cascade_shift.json"
TARGET_US = 20.0
_PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, (1.0,))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.cascade shift", description=__doc__)
    parser.add_argument("--decisions", type=int, default=200_000)
    parser.add_argument("--gears", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    rounds = [_round(settings.decisions, settings.gears, seed) for seed in range(settings.rounds)]
    p50, p99 = ([each[at] for each in rounds] for at in (0, 1))
    shifts = [each[2] for each in rounds]
    said = "met" if max(p99) < TARGET_US else "missed"
    Console().print(
        f"{settings.decisions} decisions over {settings.gears} gears, {settings.rounds} rounds: "
        f"p50 {min(p50):.2f} to {max(p50):.2f} us, p99 {min(p99):.2f} to {max(p99):.2f} us "
        f"(< {TARGET_US:g} {said}); {min(shifts)} to {max(shifts)} shifts",
        highlight=False,
    )
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "p50_us": p50,
        "p99_us": p99,
    }
    settings.out.parent.mkdir(exist_ok=True)
    settings.out.write_text(json.dumps(document, indent=1))


def _round(decisions: int, count: int, seed: int) -> tuple[float, float, int]:
    """Return p50 and p99 in microseconds, and how many decisions were shifts."""
    stage = (Stage(ModelName("m")),)
    gears = tuple(Gear(100.0 * 3**number, stage, _PROMISE) for number in range(count))
    draw, policy, state = random.Random(seed), ShiftPolicy(), GearState(0, 0.0)
    samples, rate = [], 100.0
    for number in range(decisions):
        if draw.random() < 0.01:
            rate = 10 ** draw.uniform(1, 5)
        samples.append(LoadSample(0.1 * (number + 1), rate * 0.1 * draw.random(), rate * 0.02))
    spent_ns, shifts = [], 0
    for sample in samples:
        began_ns = time.perf_counter_ns()
        after = shift(state, sample, gears, policy)
        spent_ns.append(time.perf_counter_ns() - began_ns)
        shifts += after.gear != state.gear
        state = after
    spent_ns.sort()
    return spent_ns[decisions // 2] / 1e3, spent_ns[int(decisions * 0.99)] / 1e3, shifts


if __name__ == "__main__":
    main()
