"""Plots of a gear plan; need the extras `planner` and `plots`."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gearfall.cli.figure_files import save_figure
from gearfall.cli.reliability_plots import write_reliability
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.gears.gear_plan_checks import counting_of
from gearfall.core.profile import Profile
from gearfall.gears.answers import ModelAnswers
from gearfall.gears.counted_answers import counted_of
from gearfall.gears.profile_answers import (
    answers_of,
    beginnings,
    certainties_of,
    learning,
    shuffled,
)
from gearfall.gears.search import front
from gearfall.gears.signals import compare_signals
from gearfall.simulation.cascades.plan_day import Moment


def write_plan_plots(
    directory: Path, plan: GearPlan, profile: Profile, day: Sequence[Moment]
) -> list[Path]:
    """Write the front with the plan's gears, the gears over a day, reliability; return the files.

    A profile without log-probabilities has no reliability to draw.
    """
    order = shuffled(profile)
    rows = order[len(learning(order)) :]
    judged = beginnings(profile, plan.hold_tokens)
    certainties = certainties_of(judged, plan.calibrations, plan.certainty)
    columns = answers_of(profile, certainties, hold_tokens=plan.hold_tokens)
    columns += counted_of(profile, next(iter(counting_of(plan)), None))
    tested = [each.take(rows) for each in columns]
    written = save_figure(_front(plan, tested), directory, "front")
    written += save_figure(_day(plan, day), directory, "gears")
    try:
        reports = compare_signals(profile, order)
    except InvalidRequest:
        return written
    return written + write_reliability(directory, reports)


def _front(plan: GearPlan, tested: Sequence[ModelAnswers]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    cascades = front(tested)
    axes.step(
        [each.cost for each in cascades],
        [each.quality for each in cascades],
        where="post",
        label="best cascades in hindsight",
    )
    for each in tested:
        if each.several:
            continue
        cost, quality = float(each.cost.mean()), float(each.correct.mean())
        axes.scatter([cost], [quality], marker="s", color="0.4", zorder=3)
        axes.annotate(f"{each.model} alone", (cost, quality), (6, -12), textcoords="offset points")
    places: dict[tuple[float, float], list[str]] = {}
    for number, gear in enumerate(plan.gears):
        promise = gear.promise
        cost = promise.cost - promise.start_cost
        places.setdefault((cost, promise.quality), []).append(str(number))
        axes.scatter([cost], [promise.quality], color="C1", zorder=4)
        if promise.quality_bound:
            axes.vlines(cost, promise.quality_bound, promise.quality, color="C1")
    for place, numbers in places.items():
        axes.annotate(", ".join(numbers), place, (-6, 6), textcoords="offset points", ha="right")
    axes.scatter([], [], color="C1", label="gears, down to what is certified")
    axes.set(
        xscale="log",
        xlabel=f"mean cost of a request, {plan.cost_unit}",
        ylabel="share of right answers",
        title=f"{plan.name} version {plan.version}: {plan.target}",
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _day(plan: GearPlan, day: Sequence[Moment]) -> Figure:
    figure = Figure(figsize=(8, 8), layout="constrained")
    load, gear, latency, quality = figure.subplots(4, 1, sharex=True)
    times = [each.at_s for each in day]
    load.plot(times, [each.load for each in day])
    for each in plan.gears:
        load.axhline(each.max_load, color="0.8", linewidth=0.8)
    load.set_ylabel("load, tokens/s")
    gear.step(times, [each.gear for each in day], where="post")
    gear.set(ylabel="gear", yticks=range(len(plan.gears)))
    seen = [each for each in day if each.p95_s is not None]
    latency.plot([each.at_s for each in seen], [each.p95_s for each in seen])
    latency.set_ylabel("p95, s")
    quality.plot([each.at_s for each in seen], [each.quality for each in seen])
    quality.set(ylabel="share right", xlabel="simulated seconds", ylim=(None, 1.0))
    for axes in (load, gear, latency, quality):
        axes.grid(visible=True, alpha=0.3)
    figure.suptitle(f"{plan.name} version {plan.version}: gears over load, simulated")
    return figure
