"""The planner on published answers: `python -m bench.cascade thresholds`.

Replays of LLaMA 7B and 13B on HellaSwag (../shared/data); the exact front against cascades with
random margin thresholds; planning time on three models of 15,000 made-up queries; and how often a
plan that was made on a random half keeps its target on the other half, certified and not.
Certified for the next queries: the held-out half is a sample itself, and its mean varies too. What
is promised is that at most delta of all splits have a plan that breaks its target.
"""

import argparse
import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.gears.answers import ModelAnswers
from gearfall.gears.choice import choose
from gearfall.gears.search import Cascade, evaluate, front

DATA = Path(__file__).parents[3] / "shared" / "data" / "hellaswag_llama" / "hellaswag_1000.csv"
RESULTS = Path(__file__).parents[1] / "results" / "cascade_thresholds.json"
COSTS = {"7b": 1.0, "13b": 1.82}
PUBLISHED = {0.1: (0.391, 0.569, 1.71162), 0.2: (0.599, 0.578, 2.09018)}
"""Margin threshold: share that goes up, accuracy, cost."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Plans made on one half of the queries, looked at on the other."""

    data: str
    target: float
    delta: float
    is_certified: bool
    planned: int
    refused: int
    """Halves that could not certify the target."""
    held: int
    """Plans whose quality on the other half was not below the target."""
    cost: float
    """Mean over the held-out halves, of the plans made."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.cascade thresholds", description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000, help="random cascades")
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    llama, made_up = _llama(), _family(15_000)
    replays = {margin: evaluate(llama, [margin]) for margin in PUBLISHED}
    dominated = _dominated(llama, settings.samples)
    began_s = time.perf_counter()
    cascades = front(made_up)
    planning_s = time.perf_counter() - began_s
    splits = [
        _split(name, models, target, settings, is_certified=is_certified)
        for name, models, target in (("hellaswag", llama, 0.5), ("made up", _family(4000), 0.75))
        for is_certified in (True, False)
    ]
    summary = (
        f"{dominated} of {settings.samples} random margin cascades are matched or beaten by the "
        f"front; planning three models of 15,000 queries: {planning_s:.2f} s, {len(cascades)} "
        "cascades"
    )
    _print(replays, summary, splits)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "replays": {str(margin): asdict(each) for margin, each in replays.items()},
        "random_cascades": settings.samples,
        "random_cascades_that_no_front_point_matches": settings.samples - dominated,
        "planning_s_3x15000": planning_s,
        "front_3x15000": len(cascades),
        "splits": [asdict(each) for each in splits],
    }
    settings.out.parent.mkdir(exist_ok=True)
    settings.out.write_text(json.dumps(document, indent=1))


def _llama() -> list[ModelAnswers]:
    if not DATA.exists():
        raise SystemExit(f"the published answers are not here: {DATA}")
    rows = list(csv.DictReader(DATA.read_text().splitlines()))
    return [
        ModelAnswers(
            ModelName(size),
            np.array([float(row[f"{size}_correct"]) for row in rows]),
            np.array([float(row[f"{size}_margin"]) for row in rows]),
            np.full(len(rows), cost),
        )
        for size, cost in COSTS.items()
    ]


def _family(count: int) -> list[ModelAnswers]:
    """Three models, each better and dearer, whose certainty tells something of their answers."""
    random = np.random.default_rng(11)
    hardness, found = random.random(count), []
    for number, (skill, cost) in enumerate(((0.6, 1.0), (0.75, 5.0), (0.88, 20.0))):
        noise = 0.1 * random.standard_normal(count)
        chance = np.clip(skill + 0.3 - 0.6 * hardness + noise, 0.0, 1.0)
        right = (random.random(count) < chance).astype(float)
        found.append(ModelAnswers(ModelName(f"m{number}"), right, chance, np.full(count, cost)))
    return found


def _dominated(models: Sequence[ModelAnswers], samples: int) -> int:
    """Return how many random cascades a point of the front matches or beats in both."""
    cascades = front(models)
    costs = np.array([each.cost for each in cascades])
    best = np.maximum.accumulate([each.quality for each in cascades])
    random = np.random.default_rng(3)
    count = 0
    for threshold in random.random(samples):
        tried = evaluate(models, [float(threshold)])
        place = int(np.searchsorted(costs, tried.cost + 1e-12, side="right")) - 1
        count += bool(place >= 0 and best[place] >= tried.quality - 1e-12)
    return count


def _split(
    name: str,
    models: Sequence[ModelAnswers],
    target: float,
    settings: argparse.Namespace,
    *,
    is_certified: bool,
) -> Splits:
    random, half = np.random.default_rng(17), models[0].count // 2
    planned = refused = held = 0
    costs = []
    for _ in range(settings.splits):
        order = random.permutation(models[0].count)
        plan_on = [each.take(order[:half]) for each in models]
        look_at = {each.model: each.take(order[half:]) for each in models}
        try:
            if is_certified:
                mixed = random.permutation(half)
                cascade = choose(
                    plan_on, target, delta=settings.delta, order=mixed, horizon=half, grid=64
                ).cascade
            else:
                cascade = _uncertified(plan_on, target)
        except InvalidRequest:
            refused += 1
            continue
        planned += 1
        limits = [stage.threshold for stage in cascade.stages if stage.threshold is not None]
        seen = evaluate([look_at[stage.model] for stage in cascade.stages], limits)
        held += bool(seen.quality >= target - 1e-12)
        costs.append(seen.cost)
    mean = float(np.mean(costs)) if costs else float("nan")
    return Splits(name, target, settings.delta, is_certified, planned, refused, held, mean)


def _uncertified(models: Sequence[ModelAnswers], target: float) -> Cascade:
    """Return the cheapest that had the target on the queries that it was chosen on."""
    good = [each for each in front(models, grid=64) if each.quality >= target]
    if not good:
        raise InvalidRequest("no cascade reaches the target")
    return good[0]


def _print(replays: Mapping[float, Cascade], summary: str, splits: Sequence[Splits]) -> None:
    console = Console()
    for margin, each in replays.items():
        up, accuracy, cost = PUBLISHED[margin]
        console.print(
            f"margin < {margin}: goes up {each.reached[1]:.3f} ({up}), accuracy "
            f"{each.quality:.3f} ({accuracy}), cost {each.cost:.5f} ({cost})",
            highlight=False,
        )
    console.print(summary, highlight=False)
    table = Table(
        "data", "target", "delta", "certified", "plans", "refused", "broken", "share", "cost",
        box=box.SIMPLE,
    )  # fmt: skip
    for row in splits:
        broken = row.planned - row.held
        table.add_row(
            row.data,
            f"{row.target:g}",
            f"{row.delta:g}",
            "yes" if row.is_certified else "no",
            str(row.planned),
            str(row.refused),
            str(broken),
            f"{broken / (row.planned + row.refused):.3f}",
            f"{row.cost:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
