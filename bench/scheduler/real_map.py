"""Where choosing nodes pays: `python -m bench.scheduler real_simulated --map`.

The cluster of `real` with answers, load, bursts and memory varied one against the other, over many
seeds, simulated. Answers are counted in the time of a load from disk, the mean of the skewed
trace's two kinds of answers, in its proportion; the load of the places is what its answers would
use of them if each ran alone. Each field is the mean p99 of random and of locality-only over ours.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from rich import box
from rich.table import Table

from bench.scheduler.real_traces import TRACES, Trace

TARGET = 1.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the map."""

    answer_loads: float
    used: float
    """Share of the places."""
    dram_models: int
    """Of the trace's models that fit into each node's memory."""
    cv: float
    """Of the gaps."""

    @property
    def area(self) -> str:
        """What one table of the map has in common."""
        return f"{self.dram_models} models in each memory, CV {self.cv:g}"

    @property
    def name(self) -> str:
        """All of it."""
        return f"{self.area}, answers {self.answer_loads:g} loads, places used {self.used:g}"

    def trace(self, requests: int) -> Trace:
        """Return the skewed trace as this point has it, with so many requests."""
        base = TRACES["skewed"]
        mean = sum(each.mean for each in base.answers) / len(base.answers)
        scale = self.answer_loads / mean
        shape = replace(base.shape, dram_models=self.dram_models)
        per_s = self.used * shape.nodes * shape.places / (self.answer_loads * shape.load_s)
        return replace(
            base,
            shape=shape,
            per_s=per_s,
            duration_s=requests / per_s,
            cv=self.cv,
            answers=tuple(
                replace(each, mean=scale * each.mean, most=scale * each.most)
                for each in base.answers
            ),
        )


Figures = Mapping[str, Sequence[float]]
"""By policy, the p99 of each seed."""


def add_map_flags(parser: argparse.ArgumentParser) -> None:
    """Add what spans the map."""
    parser.add_argument("--map", action="store_true", help="the map instead of the traces")
    parser.add_argument(
        "--answers", nargs="+", type=float, default=[0.5, 1.0, 2.0, 4.0], help="in loads"
    )
    parser.add_argument(
        "--used", nargs="+", type=float, default=[0.1, 0.2, 0.4], help="of the places"
    )
    parser.add_argument("--memory", nargs="+", type=int, default=[4, 6, 7], help="models a node")
    parser.add_argument("--bursts", nargs="+", type=float, default=[2.0, 4.9], help="CVs")
    parser.add_argument("--requests", type=int, default=80, help="of each seed")


def cells_of(settings: argparse.Namespace) -> Iterator[Cell]:
    """Return the points that the flags span."""
    for memory, cv, answers, used in product(
        settings.memory, settings.bursts, settings.answers, settings.used
    ):
        yield Cell(answers, used, memory, cv)


def tables_of(found: Mapping[Cell, Figures]) -> Iterator[Table]:
    """Return a table for each memory and CV: answers down, load of the places across."""
    areas: dict[str, list[Cell]] = defaultdict(list)
    for cell in found:
        areas[cell.area].append(cell)
    for area, cells in areas.items():
        used = sorted({each.used for each in cells})
        table = Table("answers, loads", *(f"used {each:g}" for each in used), box=box.SIMPLE)
        table.title = f"{area}: ours s, random / locality only over ours (* both >= {TARGET:g})"
        for answers in sorted({each.answer_loads for each in cells}):
            row = sorted(
                (each for each in cells if each.answer_loads == answers), key=lambda c: c.used
            )
            table.add_row(f"{answers:g}", *(_field(found[each]) for each in row))
        yield table


def ratios_of(figures: Figures) -> tuple[float, float]:
    """Return the mean p99 of random and of locality-only over the mean of ours."""
    ours = sum(figures["ours"])
    return sum(figures["random"]) / ours, sum(figures["locality"]) / ours


def _field(figures: Figures) -> str:
    random, locality = ratios_of(figures)
    star = "*" if min(random, locality) >= TARGET else " "
    mean_s = sum(figures["ours"]) / len(figures["ours"])
    return f"{mean_s:.2f}  {random:.2f} / {locality:.2f}{star}"
