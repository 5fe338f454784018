"""The simulator against the real system at four loads: `python -m bench.cascade simulated`.

Same cluster, profile and plan as `real`; each load is the trace squeezed to so many requests a
second. The simulator knows the profile and the arrivals. Here the profile's own questions are
asked, each when the simulator has it come: what is compared is the simulator, not two draws of
questions (`real` predicts its runs of the trace from other questions than it asks).

Each load is predicted three times: at the speed of the profile, at that which a probe with prompts
of its own measured right before (`real_probe.py`), and at that at which the workers' engines
computed while they served, twice a second (`real_served.py`). The last is no prediction that could
be made beforehand: it parts the simulator's errors from the machine's.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cascade.real_console import console
from bench.cascade.real_figures import (
    Figures,
    Miss,
    Run,
    figures_of,
    miss_of,
    over_rounds,
)
from bench.cascade.real_probe import Pace
from bench.cascade.real_report import print_fidelity
from bench.cascade.real_served import mean_slowness
from bench.cascade.real_site import Settings, Site, site
from bench.cascade.real_systems import LARGE, OURS
from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated

RESULTS = Path(__file__).parents[1] / "results" / "cascade_simulated.json"
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Of the highest load that is planned for, or that the largest model can serve alone."""


@dataclass(frozen=True, slots=True)
class Checked:
    """One system at one load."""

    system: str
    per_s: float
    measured: Figures
    predicted: Figures
    at_pace: Figures
    """Predicted at the speed that was probed before each round; medians, as those measured."""
    as_served: Figures
    """Predicted at the speed that each round was served at."""
    slowness: tuple[float, ...]
    """Of the workers while they served, one each round: the mean over them and over time."""
    paces: tuple[Pace, ...]
    """One each round."""
    rounds: tuple[Figures, ...]
    """As measured, one each."""

    @property
    def miss(self) -> Miss:
        """The prediction's errors."""
        return miss_of(self.predicted, self.measured)

    @property
    def miss_at_pace(self) -> Miss:
        """Those of the prediction at the probed speed."""
        return miss_of(self.at_pace, self.measured)

    @property
    def miss_as_served(self) -> Miss:
        """Those of the prediction at the speed that was served at."""
        return miss_of(self.as_served, self.measured)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, predict, print, write JSON."""
    parser = Settings.flags("bench.cascade simulated", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(argv)
    asyncio.run(_run(chosen))


async def _run(chosen: argparse.Namespace) -> None:
    settings = Settings.of(chosen)
    with tempfile.TemporaryDirectory(prefix="gearfall-cascade-") as scratch:
        async with site(settings, Path(scratch), chosen.keep) as there:
            checked = await check_simulator(there, settings.seconds, settings.rounds)
    print_fidelity(console, checked)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "loads": [fidelity_json(each) for each in checked],
    }
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(document, indent=1))


async def check_simulator(
    there: Site, seconds: float, rounds: int, systems: Sequence[str] = (OURS, LARGE)
) -> list[Checked]:
    """Run each system at each load in every round, and predict the same; nothing without one."""
    if not rounds:
        return []
    highest = {OURS: there.highest_per_s, LARGE: there.large_per_s}
    cells = [(name, share * highest[name]) for name in systems for share in SHARES]
    runs: dict[tuple[str, float], list[Run]] = {cell: [] for cell in cells}
    paces: dict[tuple[str, float], list[Pace]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for at in rotated([str(place) for place in range(len(cells))], number):
            name, per_s = cells[int(at)]
            paces[name, per_s].append(await there.probe())
            run = await there.measure(name, number, per_s, seconds, is_profiled=True)
            runs[name, per_s].append(run)
    return [
        Checked(
            name,
            per_s,
            over_rounds(found, name),
            figures_of(there.predict(name, per_s, seconds)),
            over_rounds([there.predict(name, per_s, seconds, each) for each in paces[cell]], name),
            over_rounds(
                [there.predict(name, per_s, seconds, slow=run.slowness) for run in found], name
            ),
            tuple(mean_slowness(run.slowness) for run in found),
            tuple(paces[cell]),
            tuple(figures_of(run) for run in found),
        )
        for cell, found in runs.items()
        for name, per_s in (cell,)
    ]


def fidelity_json(each: Checked) -> Mapping[str, object]:
    """Return a load as it stands in the results."""
    return {
        **asdict(each),
        "miss": asdict(each.miss),
        "miss_at_pace": asdict(each.miss_at_pace),
        "miss_as_served": asdict(each.miss_as_served),
    }
