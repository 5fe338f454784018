"""Who leaves a draining worker first, and where to."""

from dataclasses import replace

import pytest

from gearfall.core.generation.job import Priority
from gearfall.core.ids import Epoch, JobId, ModelName, NodeId, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState
from services.worker.migration.drain_plan import Leaving, Room, by_value, choose_room, rooms_for
from tests.services.worker.fakes import MODEL, worker_record

A, B, C = WorkerId("worker-a"), WorkerId("worker-b"), WorkerId("worker-c")


def leaving(name: str, priority: Priority, tokens: int) -> Leaving:
    return Leaving(JobId(name), Epoch(1), priority, tokens)


def test_interactive_before_batch_and_most_tokens_first():
    jobs = [
        leaving("batch-long", Priority.BATCH, 9000),
        leaving("short", Priority.INTERACTIVE, 10),
        leaving("long", Priority.INTERACTIVE, 500),
        leaving("batch-short", Priority.BATCH, 5),
    ]
    ordered = [job.job_id for job in by_value(jobs)]
    assert ordered == ["long", "short", "batch-long", "batch-short"]


def replica(worker: WorkerId, *, running=0, state=ReplicaState.READY, model=MODEL):
    return ReplicaRecord(worker, NodeId("n"), ModelName(model), state, 4, running, 1, 0, 0.0)


def rooms(*replicas, draining=()):
    workers = {w: worker_record(w) for w in (A, B, C)}
    for worker in draining:
        workers[worker] = replace(workers[worker], max_replicas=0)
    found = rooms_for(MODEL, A, {(r.worker_id, r.model): r for r in replicas}, workers)
    return [(room.worker_id, room.free_slots) for room in found]


def test_rooms_are_other_workers_where_the_model_is_ready():
    assert rooms(replica(A), replica(B, running=1), replica(C)) == [(B, 3), (C, 4)]
    assert rooms(replica(B, state=ReplicaState.STARTING), replica(C, model="other")) == []
    assert rooms(replica(B), replica(C), draining=[B]) == [(C, 4)]
    assert rooms(replica(WorkerId("gone"))) == []


@pytest.mark.parametrize(
    ("taken", "attempts", "chosen"),
    [
        ({}, {}, C),
        ({C: 2}, {}, B),
        ({C: 1}, {C: 1}, B),
        ({}, {B: 1, C: 1}, C),
        ({}, {B: 2, C: 1}, C),
        ({}, {B: 2, C: 2}, None),
    ],
)
def test_the_room_with_most_slots_that_did_not_refuse_too_often(taken, attempts, chosen):
    room = choose_room([Room(B, "b:1", 1), Room(C, "c:1", 2)], taken, attempts)
    assert (room.worker_id if room else None) == chosen


def test_a_worker_that_seems_full_is_asked_all_the_same():
    room = choose_room([Room(B, "b:1", 0)], {}, {})
    assert room is not None
