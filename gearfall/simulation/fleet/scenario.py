"""A fleet, its requests and the operator's settings, to be simulated under each policy."""

from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import ceil

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.memory import estimate_replica_memory
from gearfall.core.records import AssignmentRecord
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.policies import PlacementPolicy, decide_step
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.fleet.controller import FleetController, NoController
from gearfall.simulation.fleet.tally import Tally
from gearfall.simulation.fleet.world import World
from gearfall.simulation.requests import Request, StageOutcome
from gearfall.simulation.site import Emptying, ModelProfile, Site, WorkerProfile

ORACLE = "all-warm"
"""Every model has all replicas it ever needs, ready from the beginning, on accelerators of its own:
nobody waits for anything but the computation. What it costs shows what scaling to zero saves."""

_EMPTYING = {
    PlacementPolicy.OURS: Emptying.MOVE,
    PlacementPolicy.PREEMPT: Emptying.PREEMPT,
}
"""The others let running jobs finish."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    name: str
    site: Site
    requests: tuple[Request, ...]
    policy: SchedulerPolicy = field(default_factory=SchedulerPolicy)
    seed: int = 0
    """Of policies that draw."""
    costs: StartCosts = field(default_factory=StartCosts)
    """What starts had taught before."""


@dataclass(frozen=True, slots=True)
class Run:
    """One policy's run of a scenario."""

    policy: str
    tally: Tally
    outcomes: tuple[StageOutcome, ...]
    start_errors: tuple[float, ...]
    """|predicted - measured| / measured of every start, in order."""


def policy_names() -> tuple[str, ...]:
    """All that `simulate` knows."""
    return (*(policy.value for policy in PlacementPolicy), ORACLE)


def simulate(scenario: Scenario, policy: str) -> Run:
    """Run a scenario under one policy, given by name; the same arguments give the same run."""
    if policy == ORACLE:
        site, standing = warm_site(scenario)
        world = World(site, scenario.requests, NoController(), standing=standing)
        tally = world.run()
        return Run(policy, tally, tuple(world.outcomes), ())
    chosen = PlacementPolicy(policy)
    step = decide_step(chosen, seed=scenario.seed)
    controller = FleetController(scenario.policy, step, scenario.costs)
    site = replace(scenario.site, emptying=_EMPTYING.get(chosen, Emptying.FINISH))
    world = World(site, scenario.requests, controller)
    tally = world.run()
    errors = tuple(each.error for each in controller.outcomes)
    return Run(policy, tally, tuple(world.outcomes), errors)


def warm_site(scenario: Scenario) -> tuple[Site, tuple[AssignmentRecord, ...]]:
    """Return a site with a worker for each replica that is ever needed at once."""
    site = scenario.site
    by_name = {each.record.name: each for each in site.models}
    like = _smallest_workers(site)
    node = replace(site.nodes[0], node_id=NodeId("warm"), on_ssd=(), in_dram=())
    workers, standing = [], []
    for model, copies in sorted(peak_replicas(scenario.requests, by_name, like).items()):
        template = like[model]
        for number in range(copies):
            worker_id = WorkerId(f"warm-{model}-{number}")
            record = replace(
                template.record, worker_id=worker_id, node_id=node.node_id, max_replicas=1
            )
            workers.append(replace(template, record=record))
            memory = estimate_replica_memory(by_name[model].record, record.slots)
            standing.append(
                AssignmentRecord(worker_id, model, memory.total_bytes, "always warm", 0.0)
            )
    return replace(site, nodes=(node,), workers=tuple(workers)), tuple(standing)


def _smallest_workers(site: Site) -> dict[ModelName, WorkerProfile]:
    """Return for each model the worker with the fewest accelerators that can host it."""
    found = {}
    for model in site.models:
        fitting = [
            worker
            for worker in site.workers
            if estimate_replica_memory(model.record, worker.record.slots).total_bytes
            <= worker.record.memory_bytes
        ]
        found[model.record.name] = min(fitting, key=lambda worker: worker.accelerators)
    return found


def peak_replicas(
    requests: tuple[Request, ...],
    models: dict[ModelName, ModelProfile],
    workers: dict[ModelName, WorkerProfile],
) -> Counter[ModelName]:
    """Return how many replicas each model needs so that no job ever waits for a slot.

    Jobs are taken to run alone on their replica's worst step, so that this is enough.
    """
    ends: dict[ModelName, list[float]] = {}
    peaks: Counter[ModelName] = Counter()
    for request in sorted(requests, key=lambda each: each.at_s):
        for work in request.stages:
            speed, slots = models[work.model].speed, workers[work.model].record.slots
            step_s = speed.step_s + speed.step_s_per_job * (slots - 1)
            took_s = work.prompt_tokens * speed.prefill_s_per_token + work.output_tokens * step_s
            running = ends.setdefault(work.model, [])
            while running and running[0] <= request.at_s:
                heappop(running)
            heappush(running, request.at_s + took_s)
            peaks[work.model] = max(peaks[work.model], ceil(len(running) / slots))
    return peaks
