"""Cascades on the real system under a real trace: `python -m bench.cascade real`.

A local cluster of two workers, each with one core for all that it computes, and larger companions
of the trained demo models with the same answers (`companions.py`). `gearfall profile` measures them
on questions of the calibration split, `gearfall plan` plans on that profile; then every system
(`real_systems.py`) answers the same questions of the test split, at the same moments, on the same
replicas, one after the other in each round and in another order each time.

The arrivals are a recorded trace's (Azure conversations, 2023), squeezed in time and thinned; its
busiest minutes are above what the largest model can serve. Every run is predicted from the profile,
and at four loads of ours the simulator is held against the real system, as `simulated` does.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.cascade.real_console import console
from bench.cascade.real_figures import Run, figures_of, moments
from bench.cascade.real_plot import draw
from bench.cascade.real_report import PIECE_S, print_fidelity, print_systems
from bench.cascade.real_site import Settings, Site, site
from bench.cascade.real_systems import LARGE, OURS, SYSTEMS
from bench.cascade.simulated import check_simulator, fidelity_json
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated
from gearfall.core.gears.gear_plan import Gear, plan_text
from gearfall.core.profile import ProfiledModel

RESULTS = Path(__file__).parents[1] / "results" / "cascade_real.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, predict, print, write JSON and a plot."""
    parser = Settings.flags("bench.cascade real", __doc__)
    parser.add_argument(
        "--mean", type=float, default=1.0, help="Load of the trace, of the largest's capacity."
    )
    parser.add_argument("--check-seconds", type=float, default=9.0, help="Of the simulator's.")
    parser.add_argument("--check-rounds", type=int, default=2, help="Of the simulator's; 0: none.")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=SYSTEMS,
        help=f"To be measured; {LARGE}, which the others are held against, always is.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    asyncio.run(_run(parser.parse_args(argv)))


async def _run(chosen: argparse.Namespace) -> None:
    settings = Settings.of(chosen)
    with tempfile.TemporaryDirectory(prefix="gearfall-cascade-") as scratch:
        async with site(settings, Path(scratch), chosen.keep) as there:
            _print_plans(there)
            per_s = chosen.mean * there.large_per_s
            names = tuple(name for name in SYSTEMS if name in {*chosen.systems, LARGE})
            measured = await _trace_runs(there, settings, per_s, names)
            checked = await check_simulator(
                there, chosen.check_seconds, chosen.check_rounds, (OURS,)
            )
    predicted = [there.predict(name, per_s, settings.seconds) for name in names]
    print_systems(console, measured, predicted, LARGE, there.p95_s)
    if checked:
        print_fidelity(console, checked)
    chosen.out.parent.mkdir(exist_ok=True)
    document = {
        **_setting(there, settings, per_s),
        "measured": [_run_json(run) for run in measured],
        "predicted": [_run_json(run) for run in predicted],
        "simulator": [fidelity_json(each) for each in checked],
    }
    chosen.out.write_text(json.dumps(document, indent=1))
    picture = chosen.out.with_suffix(".png")
    draw(measured, there.p95_s, picture)
    console.print(f"written: {chosen.out}, {picture}", highlight=False)


async def _trace_runs(
    there: Site, settings: Settings, per_s: float, names: Sequence[str]
) -> list[Run]:
    """Replay the trace on each system, in each round in another order."""
    order = [(name, number) for number in range(settings.rounds) for name in rotated(names, number)]
    return [await there.measure(name, number, per_s, settings.seconds) for name, number in order]


def _print_plans(there: Site) -> None:
    for name, plan in there.plans.items():
        for gear in plan.gears:
            console.print(f"{name:>14}  up to {gear.max_load:6.0f} tokens/s: {_words(gear)}")


def _words(gear: Gear) -> str:
    parts = [
        stage.model if stage.threshold is None else f"{stage.model} <{stage.threshold:.3f}>"
        for stage in gear.stages
    ]
    tuned = [f"{model} in {count}s" for model, count in gear.triggers.items() if count > 1]
    said = gear.promise
    promised = f"right {said.quality:.3f}, {said.cost / 1e6:.0f} MFLOP, p95 {said.p95_s:.3f} s"
    return f"{' '.join(parts)} ({'; '.join([promised, *tuned])})"


def _setting(there: Site, settings: Settings, per_s: float) -> Mapping[str, object]:
    return {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {**asdict(settings), "trace": settings.trace.name},
        "speeds": {each.name: _speeds_json(each) for each in there.predictor.profile.models},
        "p95_asked_s": there.p95_s,
        "large_per_s": there.large_per_s,
        "requests_per_s": per_s,
        "trace_seconds_a_second": there.window.trace_s / settings.seconds,
        "trace_requests_a_request": there.window.thinned_by(per_s, settings.seconds),
        "plans": {name: json.loads(plan_text(plan)) for name, plan in there.plans.items()},
    }


def _speeds_json(model: ProfiledModel) -> Mapping[str, object]:
    """Return what the profile says of a model's speed, by device kind."""
    return {device: asdict(speed) for device, speed in model.speeds.items()}


def _run_json(run: Run) -> Mapping[str, object]:
    return {
        "system": run.system,
        "round": run.round_index,
        "figures": asdict(figures_of(run)),
        "moments": [asdict(each) for each in moments(run.outcomes, PIECE_S)],
    }
