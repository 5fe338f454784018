"""Records and a leader that decides over them, one step after the other."""

from dataclasses import replace

from gearfall.core.generation.job import Priority
from gearfall.core.ids import JobId, ModelName
from gearfall.core.records import RunningJob
from gearfall.scheduling.actions import Assign, BeginMove, Decide, EndMove, Unassign, Undecide
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.fleet_records import id_of
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from tests.gearfall.scheduling.clusters import (
    MIB,
    replica,
)

POLICY = SchedulerPolicy(keep_alive_s=300.0, min_residency_s=2.0, patience_s=20.0)
NOW = 100.0
ROOM = 600 * MIB
KINDS = {
    "ModelRecord": "models",
    "NodeRecord": "nodes",
    "WorkerRecord": "workers",
    "AssignmentRecord": "assignments",
    "ReplicaRecord": "replicas",
    "DemandRecord": "demand",
    "DeploymentRecord": "deployments",
}


class Cluster:
    """Records and a leader; `leader_dies` leaves the next one nothing but the records."""

    def __init__(self, *records):
        self.fleet = Fleet()
        self.now = NOW
        self.put(*records)

    def put(self, *records):
        for record in records:
            self.fleet.put(KINDS[type(record).__name__], record)

    def gone(self, *records):
        for record in records:
            kind = KINDS[type(record).__name__]
            self.fleet.remove(kind, id_of(kind, record))

    def plan(self):
        return decide(self.fleet, StartCosts(), POLICY, self.now)

    def step(self):
        """Decide and write; return what was written, but for the reasons."""
        done: list[tuple[str, ...]] = []
        for action in self.plan().actions:
            match action:
                case Assign(made):
                    self.fleet.put("assignments", made)
                    done.append(("assign", made.worker_id, made.model))
                case Unassign(key, _):
                    self.fleet.remove("assignments", key)
                    done.append(("unassign", *key))
                case BeginMove(move):
                    self.fleet.put("moves", move)
                    done.append(("move", move.worker_id, move.model, move.target))
                case EndMove(key, _):
                    self.fleet.remove("moves", key)
                    done.append(("end move", *key))
                case Decide(decision):
                    self.fleet.put("decisions", decision)
                case Undecide(name):
                    self.fleet.remove("decisions", name)
        self.fleet.check()
        return done

    def leader_dies(self):
        self.fleet = Fleet.of(self.fleet.records.as_snapshot())

    def decision(self, name):
        return self.fleet.records.decisions[ModelName(name)]


def busy(name, worker_id, *, tokens_left=10_000, priority=Priority.INTERACTIVE):
    jobs = (RunningJob(JobId("j"), 100, 0, tokens_left, priority),)
    record = replica(name, worker_id, memory_bytes=ROOM)
    return replace(record, jobs=jobs, running_jobs=1, seen_unix_s=NOW, step_s=0.1)
