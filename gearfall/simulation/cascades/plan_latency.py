"""The planner's view of latency: one gear at its highest load, replayed with bursty arrivals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gearfall.core.gears.gear_plan import Gear
from gearfall.core.ids import ModelName
from gearfall.gears.placement import Host, Placement
from gearfall.simulation.arrivals import gamma_times
from gearfall.simulation.cascades.answers import Query
from gearfall.simulation.cascades.cascade_outcomes import Arrival, CascadeRun
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.cascades.step_engine import StepSpeed
from gearfall.simulation.fleet.figures import quantile


@dataclass(frozen=True, slots=True)
class ServedModel:
    """How a replica of one model serves."""

    speed: StepSpeed
    slots: int


@dataclass(frozen=True, slots=True)
class PlanLatency:
    """Answers `build_plan`; the same question has the same answer."""

    queries: Sequence[Query]
    models: Mapping[str, ServedModel]
    tokens: Mapping[str, float]
    """By model: mean tokens of a request there."""
    requests: int = 1000
    """Replayed for each answer."""
    cv: float = 2.0
    """Of the gaps between arrivals: 1 is Poisson, above it is bursty."""
    seed: int = 0
    hold_tokens: int = 0
    """Of answers, the first tokens that stages are decided on; 0: all."""

    def __call__(self, gear: Gear, placement: Placement, hosts: Sequence[Host]) -> float:
        """Return the p95 in seconds of whole answers at the gear's highest load."""
        run = self.replay(gear, placement, hosts)
        return quantile([each.total_s for each in run.answered], 0.95)

    def replay(self, gear: Gear, placement: Placement, hosts: Sequence[Host]) -> CascadeRun:
        """Replay the gear alone at its highest load, on the replicas that a placement gives it."""
        nodes = {host.name: host.node for host in hosts}
        used = {stage.model for stage in gear.stages}
        replicas = [
            FixedReplica(
                ModelName(model),
                nodes[worker],
                self.models[model].speed,
                self.models[model].slots,
                worker,
            )
            for worker, model in placement.by_worker
            if model in used
        ]
        return self.replay_on(gear, replicas)

    def replay_on(self, gear: Gear, replicas: Sequence[FixedReplica]) -> CascadeRun:
        """Replay the gear alone at its highest load, on these replicas."""
        per_s = gear.max_load / self.tokens[gear.stages[0].model]
        generator = np.random.default_rng(self.seed)
        times = gamma_times(generator, per_s=per_s, cv=self.cv, duration_s=self.requests / per_s)
        drawn = generator.integers(0, len(self.queries), len(times))
        arrivals = [Arrival(at, int(query)) for at, query in zip(times, drawn, strict=True)]
        return run_cascades(replicas, self.queries, arrivals, [gear], hold_tokens=self.hold_tokens)


def tokens_per_s(served: ServedModel, prompt_tokens: float, output_tokens: float) -> float:
    """Return what one replica computes with all its slots full, prompt and answer tokens.

    A request is in as many steps as its answer has tokens, the first of them with the prompt; so
    a step of full slots has slots / output_tokens prompts, and one token of every other job.
    """
    begun = served.slots / output_tokens
    step_tokens = served.slots + begun * (prompt_tokens - 1.0)
    request_s = served.speed.step_s(step_tokens) / begun + served.speed.job_s
    return (prompt_tokens + output_tokens) / request_s
