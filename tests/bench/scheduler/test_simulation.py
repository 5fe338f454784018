"""The bench of simulated policies: ratios are to ours."""

from dataclasses import replace

import pytest

from bench.scheduler.simulation import Cell
from gearfall.simulation.fleet.figures import Figures, figures_of
from gearfall.simulation.fleet.scenario import simulate
from gearfall.simulation.fleet.serverlessllm import serverlessllm


def figures(policy: str) -> Figures:
    run = simulate(serverlessllm(per_s=0.5, duration_s=60.0, seed=2), policy)
    return figures_of(run, 5.0)


def test_ratios_are_to_ours():
    ours, other = figures("ours"), figures("random")
    slow = replace(other, startup_p99_s=3 * ours.startup_p99_s)
    cell = Cell("6.7b", "gsm8k", 0.5, "fleet", 1, 2, (ours, slow))
    assert cell.ratio("ours") == pytest.approx(1.0)
    assert cell.ratio("random") == pytest.approx(3.0)
    assert cell.setting == "OPT-6.7b gsm8k 0.5/s, fleet, 1 in memory"
