"""A replica in simulated time: loading, starting, serving, emptied, gone."""

from collections.abc import Callable
from dataclasses import dataclass, field

from gearfall.core.ids import JobId, ModelName, WorkerId
from gearfall.core.records import AssignmentRecord, ReplicaRecord, ReplicaState, RunningJob
from gearfall.core.start_timeline import StartTimeline
from gearfall.simulation.batch_engine import BatchEngine
from gearfall.simulation.fleet.node import LoadTimes, SimNode
from gearfall.simulation.requests import Job
from gearfall.simulation.site import ModelProfile, Timing, WorkerProfile


@dataclass(slots=True, eq=False)
class SimReplica:
    """One model on one worker. Owner of its slots."""

    assignment: AssignmentRecord
    worker: WorkerProfile
    node: SimNode
    profile: ModelProfile
    engine: BatchEngine
    accept: Callable[[Job], None]
    """Run a job here."""
    state: ReplicaState = ReplicaState.LOADING
    timeline: StartTimeline = field(default_factory=StartTimeline)
    jobs: dict[str, Job] = field(default_factory=dict)
    """That were claimed and not finished."""
    incoming: set[str] = field(default_factory=set)
    """Jobs that are on their way here from another worker: each holds a slot."""
    leaving: set[str] = field(default_factory=set)
    """Jobs that are on their way from here."""
    idle_since_s: float = 0.0
    holds_bytes: bool = False
    is_ending: bool = False
    on_loaded: Callable[[LoadTimes], None] | None = None
    """What the store calls when the bytes are there; None once it has."""
    number: int = 0
    """Of the start: what another start of the same model planned is not meant for this one."""

    @property
    def key(self) -> tuple[WorkerId, ModelName]:
        """(worker, model)."""
        return (self.assignment.worker_id, self.assignment.model)

    @property
    def free_slots(self) -> int:
        """Slots that neither a job holds nor one that is coming."""
        return self.worker.record.slots - len(self.jobs) - len(self.incoming)

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return self.state is ReplicaState.READY

    def record(self, now_s: float, timing: Timing) -> ReplicaRecord:
        """What the worker publishes of it."""
        speed = self.profile.speed
        self.engine.advance()
        return ReplicaRecord(
            worker_id=self.assignment.worker_id,
            node_id=self.worker.record.node_id,
            model=self.assignment.model,
            state=self.state,
            slots=self.worker.record.slots,
            running_jobs=len(self.jobs),
            pid=self.number,
            memory_bytes=self.assignment.memory_bytes,
            idle_since_unix_s=self.idle_since_s,
            timeline=self.timeline,
            jobs=tuple(_running(job) for job in self.jobs.values()),
            seen_unix_s=now_s,
            step_s=self.engine.step_s,
            move_fixed_s=timing.move_fixed_s + timing.pause_s,
            move_s_per_token=speed.prefill_s_per_token,
        )

    def check(self) -> None:
        """Invariant: no slot is given twice."""
        assert self.free_slots >= 0, f"{self.key}: more jobs than slots"
        assert self.is_ready or self.state is ReplicaState.DRAINING or not self.jobs


def _running(job: Job) -> RunningJob:
    return RunningJob(
        JobId(job.job_id), job.work.prompt_tokens, int(job.done_tokens), job.work.output_tokens
    )


def timeline_of(
    replica: SimReplica, times: LoadTimes, taken_s: float, now_s: float
) -> StartTimeline:
    """Return the phases of a start that is complete now."""
    speed, size = replica.profile.speed, replica.profile.record.size_bytes
    device_s = size / speed.device_bytes_per_s if speed.device_bytes_per_s else 0.0
    began_s = replica.assignment.assigned_unix_s
    return StartTimeline(
        queued_s=taken_s - began_s,
        remote_s=times.remote_s,
        ssd_s=times.ssd_s,
        device_s=device_s,
        first_token_s=speed.start_s,
        total_s=now_s - began_s,
        from_tier=times.from_tier,
        waited_s=times.queued_s,
    )
