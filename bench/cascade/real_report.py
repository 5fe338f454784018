"""Tables of `bench.cascade real` and `simulated`."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cascade.real_figures import (
    Figures,
    Miss,
    Run,
    busiest,
    cost_ratios,
    figures_of,
    loss_of,
    over_rounds,
)
from gearfall.simulation.fleet.figures import quantile

if TYPE_CHECKING:
    from bench.cascade.simulated import Checked

PIECE_S = 2.0
LIMITS = {"p50": 0.10, "p95": 0.20, "cost": 0.10}
"""Of the simulator's errors: what issue 6 asks for."""


def print_systems(
    console: Console, runs: Sequence[Run], predicted: Sequence[Run], large: str, p95_s: float
) -> None:
    """Print every system's figures, and those that the profile promised, over each other."""
    names = list(dict.fromkeys(run.system for run in runs))
    table = _table(
        "the trace: medians over the rounds, below each what the simulator said",
        "system", "right", "lost", "MFLOP", "x less", "core ms", "x less",
        "p50 ms", "p95 ms", "p99 ms", "peak p95",
    )  # fmt: skip
    for name in names:
        found = over_rounds(runs, name)
        lost = loss_of(runs, name, large)
        flops = cost_ratios(runs, name, large, lambda each: each.cost)
        device = cost_ratios(runs, name, large, lambda each: each.device_s)
        peak_s = max(peak_p95_s(run) for run in runs if run.system == name)
        table.add_row(
            name,
            f"{found.quality:.3f}",
            f"{lost.mean:+.3f} ±{1.96 * lost.error:.3f}",
            f"{found.cost / 1e6:.0f}",
            _range(flops),
            f"{1e3 * found.device_s:.1f}",
            _range(device),
            *(f"{1e3 * value:.0f}" for value in (found.p50_s, found.p95_s, found.p99_s)),
            f"{1e3 * peak_s:.0f}{' missed' if peak_s > p95_s else ''}",
        )
        for run in (run for run in predicted if run.system == name):
            table.add_row(*_predicted_row(figures_of(run), peak_p95_s(run)), style="dim")
    console.print(table)
    console.print(
        f"lost: right answers against {large} on the same questions, with its 95 % interval; "
        f"core: CPU time of workers and engines; peak: the busiest fifth of the time, p95 "
        f"<= {1e3 * p95_s:.0f} ms asked for, worst round.",
        highlight=False,
    )


def peak_p95_s(run: Run) -> float:
    """Return the p95 of the requests that came in the busiest fifth of the time."""
    return quantile([each.total_s for each in busiest(run.outcomes, PIECE_S)], 0.95)


def _predicted_row(said: Figures, peak_s: float) -> tuple[str, ...]:
    return (
        "  simulated",
        f"{said.quality:.3f}",
        "",
        f"{said.cost / 1e6:.0f}",
        "",
        f"{1e3 * said.device_s:.1f}",
        "",
        *(f"{1e3 * value:.0f}" for value in (said.p50_s, said.p95_s, said.p99_s)),
        f"{1e3 * peak_s:.0f}",
    )


def print_fidelity(console: Console, checked: "Sequence[Checked]") -> None:
    """Print predicted and measured figures at each load, and how far they are from each other.

    Below each the same as predicted at the speed that was probed before it, and as served.
    """
    table = _table(
        "the simulator against the real system: measured (predicted)",
        "system", "requests/s", "p50 ms", "p95 ms", "p99 ms", "MFLOP", "core ms",
        "p50", "p95", "p99", "cost", "core", "",
    )  # fmt: skip
    for each in checked:
        table.add_row(
            each.system,
            f"{each.per_s:.1f}",
            *_fidelity_row(each.measured, each.predicted, each.miss),
        )
        steps, ways = ([getattr(pace, name) for pace in each.paces] for name in ("steps", "way"))
        table.add_row(
            "  as probed",
            f"x{median(steps):.2f} x{median(ways):.2f}",
            *_fidelity_row(each.measured, each.at_pace, each.miss_at_pace),
            style="dim",
        )
        table.add_row(
            "  as served",
            f"x{median(each.slowness):.2f}",
            *_fidelity_row(each.measured, each.as_served, each.miss_as_served),
            style="dim",
        )
    console.print(table)
    console.print(
        "as probed: predicted at the speed right before it; x: of steps, and of all of a job that "
        "is not its steps, over the profile's.\nas served: predicted at the speed at which engines "
        "computed meanwhile, twice a second; x: processor time of steps over that of the same "
        "steps in the profile, and what others took of the core. Known afterwards only.",
        highlight=False,
    )
    _print_parts(console, checked)


def _fidelity_row(seen: Figures, said: Figures, miss: Miss) -> tuple[str, ...]:
    pairs = (
        (1e3 * seen.p50_s, 1e3 * said.p50_s),
        (1e3 * seen.p95_s, 1e3 * said.p95_s),
        (1e3 * seen.p99_s, 1e3 * said.p99_s),
        (seen.cost / 1e6, said.cost / 1e6),
        (1e3 * seen.device_s, 1e3 * said.device_s),
    )
    return (
        *(f"{one:.0f} ({other:.0f})" for one, other in pairs),
        *(f"{one:+.0%}" for one in (miss.p50, miss.p95, miss.p99, miss.cost, miss.device)),
        "met" if miss.within(LIMITS) else "missed",
    )


def _print_parts(console: Console, checked: "Sequence[Checked]") -> None:
    """Print where the time went, and where the simulator has it go."""
    table = _table(
        "where the time went: mean ms a request, measured (predicted as served)",
        "system", "requests/s", "way", "until a worker has it", "from there", "stages",
        "one stage", "p40 ms", "p60 ms",
    )  # fmt: skip
    for each in checked:
        seen, said = each.measured, each.as_served
        table.add_row(
            each.system,
            f"{each.per_s:.1f}",
            *(
                f"{1e3 * getattr(seen, name):.1f} ({1e3 * getattr(said, name):.1f})"
                for name in ("door_s", "queued_s", "engine_s")
            ),
            f"{seen.stages:.2f} ({said.stages:.2f})",
            f"{seen.one_stage:.2f} ({said.one_stage:.2f})",
            *(f"{1e3 * one:.0f} ({1e3 * other:.0f})" for one, other in _beside_p50(seen, said)),
        )
    console.print(table)
    console.print(
        "one stage: share of answers by the first; near a half p50 lies on the step from those to "
        "the ones that went up, and p40 and p60 say more.",
        highlight=False,
    )


def _beside_p50(seen: Figures, said: Figures) -> Sequence[tuple[float, float]]:
    return (seen.p40_s, said.p40_s), (seen.p60_s, said.p60_s)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True)
    return table
