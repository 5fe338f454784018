"""A large fleet as records, and the stream of changes that a busy day puts to it. Seeded."""

from collections import deque
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from gearfall.core.ids import DeploymentName, JobId, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.memory import estimate_replica_memory
from gearfall.core.records import (
    AssignmentRecord,
    DemandRecord,
    DeploymentRecord,
    ModelRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    RunningJob,
    Stage,
    WorkerRecord,
)
from gearfall.core.start_timeline import StartTimeline
from gearfall.scheduling.actions import Assign, BeginMove, Decide, EndMove, Unassign
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.reconcile import Plan
from gearfall.scheduling.snapshot import ReplicaKey

WORKERS_PER_NODE = 4
BEGAN_UNIX_S = 1_000_000.0
EVENT_S = 0.01
_GB = 10**9
_MODELS_IN_DRAM = 4
_MODELS_ON_SSD = 24
_HOLDERS = 3
"""Nodes that a model's record names."""
_SLOTS = 16
_ROUTER = RouterId("router")


@dataclass(frozen=True, slots=True)
class Change:
    """One record that is now so, or gone where `record` is None."""

    kind: str
    record_id: Any
    record: Any

    def put_to(self, fleet: Fleet) -> None:
        """Tell the fleet."""
        if self.record is None:
            fleet.remove(self.kind, self.record_id)
        else:
            fleet.put(self.kind, self.record)


def make_fleet(nodes: int, models: int, random: Random) -> Fleet:
    """Return a fleet of which nine workers in ten host something."""
    fleet = Fleet()
    names = [ModelName(f"model-{number}") for number in range(models)]
    node_ids = [NodeId(f"node-{number}") for number in range(nodes)]
    held: dict[NodeId, list[ModelName]] = {each: [] for each in node_ids}
    for name in names:
        holders = random.sample(node_ids, _HOLDERS)
        for node_id in holders:
            held[node_id].append(name)
        fleet.put("models", _model(name, holders, random))
        stages = (Stage(name),)
        fleet.put("deployments", DeploymentRecord(DeploymentName(name), stages, max_replicas=64))
    for node_id in node_ids:
        fleet.put("nodes", _node(node_id, held[node_id], random))
        for number in range(WORKERS_PER_NODE):
            worker_id = WorkerId(f"{node_id}-{number}")
            fleet.put("workers", _worker(worker_id, node_id))
            if random.random() < 0.9:
                _host(fleet, worker_id, random.choice(names), random)
    return fleet


def _model(name: ModelName, holders: list[NodeId], random: Random) -> ModelRecord:
    size_bytes = random.choice((3, 7, 13, 26)) * _GB
    return ModelRecord(
        name=name,
        digest="d" * 32,
        architecture="LlamaForCausalLM",
        parameters=size_bytes // 2,
        size_bytes=size_bytes,
        context_tokens=4096,
        vocabulary_size=32_000,
        bos_token_id=1,
        eos_token_ids=(2,),
        source="s3://models/" + name if random.random() < 0.5 else "/models/" + name,
        nodes=tuple(holders),
        dtype="bfloat16",
        kv_bytes_per_token=100_000,
    )


def _node(node_id: NodeId, held: list[ModelName], random: Random) -> NodeRecord:
    return NodeRecord(
        node_id=node_id,
        address="127.0.0.1:1",
        attach_socket="/run/store.sock",
        dram_capacity_bytes=256 * _GB,
        dram_used_bytes=0,
        ssd_bytes_per_s=random.uniform(2, 7) * _GB,
        resident=tuple(held[:_MODELS_IN_DRAM]),
        remote_bytes_per_s=random.uniform(0.5, 1.5) * _GB,
        on_ssd=tuple(held[:_MODELS_ON_SSD]),
    )


def _worker(worker_id: WorkerId, node_id: NodeId) -> WorkerRecord:
    return WorkerRecord(
        worker_id, node_id, "127.0.0.1:2", "cuda:0", 80 * _GB, max_replicas=1, slots=_SLOTS
    )


def _host(fleet: Fleet, worker_id: WorkerId, name: ModelName, random: Random) -> None:
    model = fleet.records.models[name]
    size_bytes = estimate_replica_memory(model, _SLOTS).total_bytes
    assigned = BEGAN_UNIX_S - random.uniform(60, 600)
    fleet.put("assignments", AssignmentRecord(worker_id, name, size_bytes, "was here", assigned))
    replica = _replica(fleet, (worker_id, name), BEGAN_UNIX_S, random)
    if random.random() < 0.17:
        idle_since = BEGAN_UNIX_S - random.uniform(1, 50)
        replica = replace(replica, running_jobs=0, jobs=(), idle_since_unix_s=idle_since)
    fleet.put("replicas", replica)


def _replica(fleet: Fleet, key: ReplicaKey, now: float, random: Random) -> ReplicaRecord:
    jobs = tuple(
        RunningJob(JobId(f"{key[0]}-{number}"), 200, random.randrange(200), 400)
        for number in range(random.randrange(1, 8))
    )
    return ReplicaRecord(
        worker_id=key[0],
        node_id=fleet.records.workers[key[0]].node_id,
        model=key[1],
        state=ReplicaState.READY,
        slots=_SLOTS,
        running_jobs=len(jobs),
        pid=1,
        memory_bytes=fleet.records.assignments[key].memory_bytes,
        idle_since_unix_s=0.0,
        timeline=StartTimeline(total_s=2.0),
        jobs=jobs,
        seen_unix_s=now,
        step_s=0.03,
        move_fixed_s=0.1,
        move_s_per_token=3e-4,
    )


class Stream:
    """Owner of what goes on; `next_change` says what happens next, `carry_out` what follows."""

    def __init__(self, fleet: Fleet, random: Random) -> None:
        self.now_unix_s = BEGAN_UNIX_S
        self._fleet = fleet
        self._random = random
        self._names = list(fleet.records.models)
        self._keys = list(fleet.records.replicas)
        self._starting: deque[ReplicaKey] = deque()
        self._leaving: deque[ReplicaKey] = deque()
        self._waiting: deque[ModelName] = deque()

    def next_change(self) -> tuple[str, Change]:
        """Return what happens next, with its kind in words."""
        self.now_unix_s += EVENT_S
        drawn = self._random.random()
        if self._leaving and drawn < 0.2:
            key = self._leaving.popleft()
            return "left", Change("replicas", key, None)
        if self._starting and drawn < 0.4:
            return self._start_got_ready()
        if drawn < 0.5:
            return self._arrival()
        if drawn < 0.6:
            return self._store_change()
        return self._job_change()

    def carry_out(self, plan: Plan) -> list[Change]:
        """Return what the fleet hears of a plan that was written."""
        changes = []
        for action in plan.actions:
            match action:
                case Assign(assignment):
                    key = (assignment.worker_id, assignment.model)
                    changes.append(Change("assignments", key, assignment))
                    self._starting.append(key)
                case Unassign(key, _):
                    changes.append(Change("assignments", key, None))
                    if key in self._fleet.records.replicas:
                        self._leaving.append(key)
                case BeginMove(move):
                    changes.append(Change("moves", (move.worker_id, move.model), move))
                case EndMove(key, _):
                    changes.append(Change("moves", key, None))
                case Decide(decision):
                    changes.append(Change("decisions", decision.model, decision))
        return changes

    def _start_got_ready(self) -> tuple[str, Change]:
        key = self._starting.popleft()
        if key not in self._fleet.records.assignments:
            return self._job_change()
        self._keys.append(key)
        fresh = _replica(self._fleet, key, self.now_unix_s, self._random)
        return "ready", Change("replicas", key, fresh)

    def _arrival(self) -> tuple[str, Change]:
        """Let a model be asked for that is hosted nowhere, or not enough; or have one served."""
        if len(self._waiting) > 4 and self._random.random() < 0.5:
            name = self._waiting.popleft()
            return "served", Change("demand", (name, _ROUTER), None)
        name = self._random.choice(self._names)
        if name in self._waiting:
            return self._job_change()
        self._waiting.append(name)
        demand = DemandRecord(name, _ROUTER, 1, self.now_unix_s, 200, 400)
        return "arrival", Change("demand", (name, _ROUTER), demand)

    def _store_change(self) -> tuple[str, Change]:
        """Let a store take one more model into memory and forget its oldest."""
        node_id = self._random.choice(list(self._fleet.records.nodes))
        node = self._fleet.records.nodes[node_id]
        others = [each for each in node.on_ssd or () if each not in node.resident]
        resident = (*node.resident[1:], *others[:1])
        return "store", Change("nodes", node_id, replace(node, resident=resident))

    def _job_change(self) -> tuple[str, Change]:
        """Let a replica's jobs go on, begin or end."""
        records = self._fleet.records
        for _ in range(100):
            key = self._random.choice(self._keys)
            replica = records.replicas.get(key)
            if replica is not None and key in records.assignments:
                break
        else:
            raise AssertionError("nothing is left that serves")
        if replica.running_jobs and self._random.random() < 0.2:
            ended = replace(replica, running_jobs=0, jobs=(), idle_since_unix_s=self.now_unix_s)
            return "idle", Change("replicas", key, ended)
        fresh = _replica(self._fleet, key, self.now_unix_s, self._random)
        return "jobs", Change("replicas", key, fresh)
