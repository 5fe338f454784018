"""A draining worker's jobs on their way out, against a desk that says what a test tells it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import pytest

from gearfall.core.errors import GearfallError, NotFound, Unavailable
from gearfall.core.generation.job import Priority
from gearfall.core.ids import Epoch, JobId, NodeId, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from services.worker.jobs.claims import Claim, ClaimState
from services.worker.migration.call import Moved
from services.worker.migration.cost import DataPath
from services.worker.migration.evacuation import AT_ONCE, HURRY, Evacuation
from tests.services.worker.fakes import MODEL, WORKER, Watched, job, worker_record

B, C = WorkerId("worker-b"), WorkerId("worker-c")


class Desk(Watched):
    """Moves what it is told to once it may, unless it is told why not."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: dict[str, Claim] = {}
        self.asked: list[tuple[str, str]] = []
        self.refusals: dict[tuple[str, str], list[GearfallError]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    def add(self, name: str, *, tokens: int = 1, priority: Priority = Priority.INTERACTIVE) -> None:
        claim = Claim(replace(job(name), priority=priority), ["1-0"], ClaimState.RUNNING, tokens)
        self.claims[name] = claim

    def running(self) -> tuple[Claim, ...]:
        return tuple(self.claims.values())

    async def move(
        self, job_id: JobId, epoch: Epoch, target_address: str, *, within_s: float
    ) -> Moved:
        assert 0 < within_s <= HURRY * DEADLINE_S
        self.asked.append((job_id, target_address))
        self.notify()
        await self.gate.wait()
        if refusals := self.refusals.get((job_id, target_address)):
            if isinstance(refusals[0], NotFound):
                del self.claims[job_id]
            raise refusals.pop(0)
        del self.claims[job_id]
        return Moved(job_id, Epoch(epoch + 1), B, DataPath.TOKENS, 1, 0, 10, 0.01, 0.1)


DEADLINE_S = 30.0


@dataclass
class Scene:
    cluster: Cluster
    desk: Desk
    evacuation: Evacuation
    state: MemoryState

    async def serve(self, worker: WorkerId, *, slots: int = 8) -> None:
        """Have the model be ready on a worker, which is at the address of its own name."""
        lease = await self.state.grant_lease(60.0)
        record = replace(worker_record(worker), address=worker)
        await self.cluster.put_worker(record, lease=lease)
        replica = ReplicaRecord(worker, NodeId("n"), MODEL, ReplicaState.READY, slots, 0, 1, 0, 0.0)
        await self.cluster.put_replica(replica, lease=lease)

    async def until(self, holds: Callable[[], object]) -> None:
        await self.desk.until(holds)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    state = MemoryState()
    cluster = Cluster(state)
    await cluster.start()
    desk = Desk()
    evacuation = Evacuation(cluster, desk, WORKER, MODEL)  # type: ignore[arg-type]
    opened = Scene(cluster, desk, evacuation, state)
    await opened.serve(WORKER)
    running = asyncio.create_task(evacuation.run(DEADLINE_S))
    yield opened
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    await cluster.stop()
    await state.close()


async def settled(scene: Scene) -> None:
    """Return when nothing more happens by itself."""
    for _ in range(30):
        await asyncio.sleep(0)


async def test_the_most_valuable_leave_first_and_only_some_at_once(scene):
    scene.desk.gate.clear()
    scene.desk.add("batch", tokens=900, priority=Priority.BATCH)
    for tokens in range(1, AT_ONCE + 2):
        scene.desk.add(f"job-{tokens}", tokens=tokens)
    await scene.serve(B)
    await scene.until(lambda: len(scene.desk.asked) == AT_ONCE)
    await settled(scene)
    first = [name for name, _ in scene.desk.asked]
    assert first == [f"job-{tokens}" for tokens in range(AT_ONCE + 1, 1, -1)]
    scene.desk.gate.set()
    await scene.until(lambda: len(scene.desk.asked) == AT_ONCE + 2)
    await settled(scene)
    assert scene.desk.asked[-1][0] == "batch"
    assert all(each.moved for each in scene.evacuation.departures.values())
    assert len(scene.evacuation.departures) == AT_ONCE + 2


async def test_a_refused_job_is_offered_elsewhere_and_again_when_somebody_new_serves(scene):
    scene.desk.add("job-1")
    scene.desk.refusals["job-1", B] = [Unavailable("full"), Unavailable("still full")]
    await scene.serve(B)
    await scene.until(lambda: len(scene.desk.asked) == 2)
    await settled(scene)
    assert scene.evacuation.departures[JobId("job-1")].error == "still full"
    await scene.serve(C)
    await scene.until(lambda: scene.desk.asked == [("job-1", B), ("job-1", B), ("job-1", C)])
    await settled(scene)
    assert scene.evacuation.departures[JobId("job-1")].moved


async def test_a_job_that_ended_meanwhile_is_left_alone(scene):
    scene.desk.add("job-1")
    scene.desk.refusals["job-1", B] = [NotFound("it has ended")]
    await scene.serve(B)
    await scene.until(lambda: scene.desk.asked)
    await settled(scene)
    assert scene.desk.asked == [("job-1", B)]
    assert scene.evacuation.departures[JobId("job-1")].error == "it has ended"


async def test_jobs_that_come_late_are_moved_when_it_is_woken(scene):
    await scene.serve(B)
    await settled(scene)
    scene.desk.add("late")
    scene.evacuation.wake()
    await scene.until(lambda: scene.desk.asked == [("late", B)])


async def test_it_is_settled_when_what_left_was_heard_of(scene):
    await scene.evacuation.settled()
    scene.desk.gate.clear()
    scene.desk.add("job-1")
    await scene.serve(B)
    await scene.until(lambda: scene.desk.asked)
    waiting = asyncio.create_task(scene.evacuation.settled())
    await settled(scene)
    assert not waiting.done()
    scene.desk.gate.set()
    await waiting
    assert scene.evacuation.departures[JobId("job-1")].moved


async def test_jobs_are_spread_over_the_workers(scene):
    scene.desk.gate.clear()
    await scene.serve(B, slots=2)
    await scene.serve(C, slots=2)
    for number in range(4):
        scene.desk.add(f"job-{number}")
    scene.evacuation.wake()
    await scene.until(lambda: len(scene.desk.asked) == 4)
    assert sorted(target for _, target in scene.desk.asked) == [B, B, C, C]
    scene.desk.gate.set()
    await settled(scene)
