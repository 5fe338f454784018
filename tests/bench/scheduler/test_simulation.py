"""The scheduler's benches: the trace is the seed's, ratios are to ours."""

import argparse
from dataclasses import replace

import pytest

from bench.scheduler.real import add_trace_flags, shape_of, trace_of
from bench.scheduler.simulation import Cell
from gearfall.core.ids import ModelName
from gearfall.simulation.figures import Figures, figures_of
from gearfall.simulation.scenario import simulate
from gearfall.simulation.serverlessllm import serverlessllm

MODELS = [ModelName(f"m{number}") for number in range(6)]


def figures(policy: str) -> Figures:
    run = simulate(serverlessllm(per_s=0.5, duration_s=60.0, seed=2), policy)
    return figures_of(run, 5.0)


def test_ratios_are_to_ours():
    ours, other = figures("ours"), figures("random")
    slow = replace(other, startup_p99_s=3 * ours.startup_p99_s)
    cell = Cell("6.7b", "gsm8k", 0.5, "fleet", 2, (ours, slow))
    assert cell.ratio("ours") == pytest.approx(1.0)
    assert cell.ratio("random") == pytest.approx(3.0)


def test_every_policy_of_a_real_run_gets_the_same_trace():
    parser = argparse.ArgumentParser()
    add_trace_flags(parser)
    flags = parser.parse_args(["--rate", "2", "--duration", "20", "--models", "6"])
    requests = trace_of(flags, MODELS)
    assert requests == trace_of(flags, MODELS)
    assert len(requests) == 40
    assert {each.stages[0].model for each in requests} <= set(MODELS)
    assert shape_of(flags).models == 6
