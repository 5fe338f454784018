"""A cluster's records by the handful, and the places that one model has on it."""

from dataclasses import replace

from gearfall.core.generation.job import Priority
from gearfall.core.ids import JobId, ModelName
from gearfall.core.records import RunningJob
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.options import (
    find_options,
)
from gearfall.scheduling.placement.placement_reasons import rejected_by
from gearfall.scheduling.placement.placement_search import Search
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.scheduling.scene import Scene
from tests.gearfall.scheduling.clusters import (
    MIB,
    assignment,
    model,
    node,
    replica,
    worker,
)

POLICY = SchedulerPolicy(keep_alive_s=300.0, min_residency_s=2.0, patience_s=20.0)
NOW = 100.0
BIG = 600 * MIB
SMALL = ModelName("small")


class World:
    """Records by the handful; `options` asks where the model `small` could start."""

    def __init__(self, *records, now=NOW, **wanted):
        self.fleet = Fleet()
        self.fleet.put("models", model(**wanted))
        for record in records:
            self.fleet.put(KINDS[type(record).__name__], record)
        self.scene = Scene(self.fleet, StartCosts(), POLICY, now)

    def want(self, urgency=Urgency.INTERACTIVE, since=NOW):
        self.fleet.refresh(POLICY, self.scene.now_unix_s)
        found = self.fleet.model(SMALL)
        assert found is not None
        return Want(found, urgency, since, rules=self.fleet.rules_of(SMALL))

    def options(self, urgency=Urgency.INTERACTIVE, since=NOW):
        want = self.want(urgency, since)
        return find_options(self.scene, want, Search(self.fleet, want))

    def rejected(self, *others):
        want = self.want()
        search = Search(self.fleet, want)
        return dict(rejected_by(self.scene, want, search, None, list(others)))


KINDS = {
    "ModelRecord": "models",
    "NodeRecord": "nodes",
    "WorkerRecord": "workers",
    "AssignmentRecord": "assignments",
    "ReplicaRecord": "replicas",
    "DemandRecord": "demand",
    "DeploymentRecord": "deployments",
}


def where(options):
    return [(option.way, *option.workers) for option in options]


def hosts(name, worker_id, *, at=0.0, size=BIG, **fields):
    """A model's registration, assignment and replica."""
    return (
        model(name, size_bytes=10 * MIB, nodes=("n1", "n2", "node-a")),
        assignment(name, worker_id, memory_bytes=size, at=at),
        replica(name, worker_id, memory_bytes=size, **fields),
    )


def runs(*tokens_left, prompt=100, priority=Priority.INTERACTIVE):
    """The fields of a replica with jobs that have so many tokens to go, a step taking 0.1 s."""
    jobs = tuple(
        RunningJob(JobId(f"j{i}"), prompt, 0, left, priority) for i, left in enumerate(tokens_left)
    )
    return {"jobs": jobs, "running_jobs": len(jobs), "seen_unix_s": NOW, "step_s": 0.1}


def busy(name, worker_id, *tokens_left, at=0.0, size=BIG, **fields):
    registered, assigned, record = hosts(name, worker_id, at=at, size=size)
    return registered, assigned, replace(record, **runs(*tokens_left, **fields))


def full_of(*replicas):
    """One worker whose memory just takes what is on it."""
    return World(
        node(), worker("a", memory_bytes=len(replicas) // 3 * BIG), *replicas, size_bytes=10 * MIB
    )
