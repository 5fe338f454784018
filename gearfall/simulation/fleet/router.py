"""A router in simulated time: one queue for each model, and what it tells the scheduler of it."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import DemandRecord, LoadRecord
from gearfall.simulation.agenda import Agenda
from gearfall.simulation.fleet.replica import SimReplica
from gearfall.simulation.requests import Job
from gearfall.simulation.site import Timing

ROUTER = RouterId("router-1")


@dataclass(slots=True)
class _Queue:
    model: ModelName
    jobs: deque[Job] = field(default_factory=deque)
    replicas: dict[str, SimReplica] = field(default_factory=dict)
    """Ready ones, by worker."""
    demand: DemandRecord | None = None
    is_looked_after: bool = False
    """Whether a look at the demand is planned."""
    arrived_jobs: int = 0
    arrived_prompt_tokens: int = 0
    produced_tokens: int = 0
    unfinished_jobs: int = 0
    load_written_s: float = float("-inf")
    is_load_due: bool = False


class SimRouter:
    """Owner of what waits. Replicas with room take from the front."""

    def __init__(
        self,
        agenda: Agenda,
        timing: Timing,
        put: Callable[[str, DemandRecord | LoadRecord], None],
        remove_demand: Callable[[ModelName], None],
    ) -> None:
        """`put` writes a record of a kind, `remove_demand` deletes a model's demand."""
        self._agenda = agenda
        self._timing = timing
        self._put = put
        self._remove_demand = remove_demand
        self._queues: dict[ModelName, _Queue] = {}
        self.waiting_jobs = 0

    def submit(self, job: Job) -> None:
        """A job came."""
        queue = self._queue(job.work.model)
        queue.arrived_jobs += 1
        queue.arrived_prompt_tokens += job.work.prompt_tokens
        queue.unfinished_jobs += 1
        queue.jobs.append(job)
        self.waiting_jobs += 1
        self._dispatch(queue)
        self._note_load(queue)

    def put_back(self, job: Job) -> None:
        """A job that had begun waits again, before all others."""
        queue = self._queue(job.work.model)
        job.waits_since_s = self._agenda.now_s
        queue.jobs.appendleft(job)
        self.waiting_jobs += 1
        self._dispatch(queue)

    def finished(self, job: Job) -> None:
        """A job is over."""
        queue = self._queue(job.work.model)
        queue.unfinished_jobs -= 1
        queue.produced_tokens += job.work.output_tokens
        self._note_load(queue)

    def open(self, replica: SimReplica) -> None:
        """A replica takes jobs from now on."""
        queue = self._queue(replica.assignment.model)
        queue.replicas[replica.assignment.worker_id] = replica
        self._dispatch(queue)

    def close(self, replica: SimReplica) -> None:
        """A replica takes no more."""
        queue = self._queue(replica.assignment.model)
        if queue.replicas.get(replica.assignment.worker_id) is replica:
            del queue.replicas[replica.assignment.worker_id]
        self._look(queue)

    def room(self, model: ModelName) -> None:
        """A replica of the model may have room again."""
        self._dispatch(self._queue(model))

    def ready(self, model: ModelName) -> list[SimReplica]:
        """Replicas of a model that take jobs."""
        return list(self._queue(model).replicas.values())

    def _queue(self, model: ModelName) -> _Queue:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = _Queue(model)
        return queue

    def _dispatch(self, queue: _Queue) -> None:
        while queue.jobs:
            replica = max(
                queue.replicas.values(),
                key=lambda r: (r.free_slots, r.assignment.worker_id),
                default=None,
            )
            if replica is None or replica.free_slots <= 0:
                break
            self._claim(queue, replica)
        self._look(queue)

    def _claim(self, queue: _Queue, replica: SimReplica) -> None:
        job, now_s = queue.jobs.popleft(), self._agenda.now_s
        self.waiting_jobs -= 1
        job.waited_s += now_s - job.waits_since_s
        job.claimed_s = job.claimed_s or now_s
        replica.accept(job)

    def _look(self, queue: _Queue) -> None:
        """Have the demand record say what waits: none, new, or changed by much."""
        if not queue.jobs:
            if queue.demand is not None:
                queue.demand = None
                self._remove_demand(queue.model)
            return
        now_s = self._agenda.now_s
        overdue_s = queue.jobs[0].waits_since_s + self._timing.overdue_s
        if queue.demand is None and queue.replicas and overdue_s > now_s:
            self._look_at(queue, overdue_s)
        elif queue.demand is None:
            self._publish(queue)
        elif _differs(queue.demand.waiting_jobs, len(queue.jobs)):
            self._look_at(queue, now_s + self._timing.demand_interval_s)

    def _look_at(self, queue: _Queue, when_s: float) -> None:
        if not queue.is_looked_after:
            queue.is_looked_after = True
            self._agenda.at(when_s, partial(self._look_again, queue))

    def _look_again(self, queue: _Queue) -> None:
        queue.is_looked_after = False
        demand = queue.demand
        if demand is not None and queue.jobs:
            if _differs(demand.waiting_jobs, len(queue.jobs)):
                self._publish(queue)
            return
        self._look(queue)

    def _publish(self, queue: _Queue) -> None:
        queue.demand = DemandRecord(
            queue.model,
            ROUTER,
            len(queue.jobs),
            min(job.waits_since_s for job in queue.jobs),
            prompt_tokens=sum(job.context_tokens for job in queue.jobs),
            output_tokens=sum(job.work.output_tokens - int(job.done_tokens) for job in queue.jobs),
        )
        self._put("demand", queue.demand)

    def _note_load(self, queue: _Queue) -> None:
        if queue.is_load_due:
            return
        queue.is_load_due = True
        due_s = queue.load_written_s + self._timing.load_interval_s
        self._agenda.at(max(due_s, self._agenda.now_s), partial(self._write_load, queue))

    def _write_load(self, queue: _Queue) -> None:
        queue.is_load_due = False
        queue.load_written_s = self._agenda.now_s
        record = LoadRecord(
            queue.model,
            ROUTER,
            self._agenda.now_s,
            queue.arrived_jobs,
            queue.arrived_prompt_tokens,
            queue.produced_tokens,
            queue.unfinished_jobs,
        )
        self._put("load", record)


def _differs(told: int, now: int) -> bool:
    """Whether a number of waiting jobs is worth telling again."""
    return now >= told + max(1, told // 4) or now <= told - max(1, told // 4)
