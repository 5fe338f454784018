"""The same seed gives the same figures in every process, whatever order its sets have."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
from gearfall.simulation.fleet.scenario import simulate
from gearfall.simulation.fleet.serverlessllm import serverlessllm
import sys
run = simulate(serverlessllm(per_s=0.8, duration_s=120.0, seed=2), sys.argv[1])
print(run.tally, run.outcomes)
"""


@pytest.mark.parametrize("policy", ["ours", "random", "preempt"])
def test_figures_do_not_depend_on_the_process(policy):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, policy],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    first, second = (run.communicate()[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert first == second
