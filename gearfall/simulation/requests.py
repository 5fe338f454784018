"""What comes to a simulated fleet, and what became of it."""

from dataclasses import dataclass

from gearfall.core.ids import ModelName


@dataclass(frozen=True, slots=True)
class StageWork:
    """What one stage of a request asks of a model."""

    model: ModelName
    prompt_tokens: int
    output_tokens: int
    goes_up: bool = False
    """Whether its answer is not certain enough, so that the next stage runs."""
    stop_tokens: int = 0
    """After which it may be stopped, for its answer goes up whatever follows; 0: never."""
    gather_s: float = 0.0
    """How long a token may wait to be told with those behind it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the stages of its cascade that may run, in order; most have one."""

    number: int
    at_s: float
    """Of its arrival, from the beginning of the simulation."""
    stages: tuple[StageWork, ...]


@dataclass(slots=True)
class Job:
    """One stage of a request on its way. Times are simulated Unix seconds, 0 for not yet."""

    request: Request
    stage: int
    arrived_s: float
    waits_since_s: float
    done_tokens: float = 0.0
    """Produced; a part of one counts as its part."""
    claimed_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0
    waited_s: float = 0.0
    """In the queue, before it began and after each preemption."""
    preemptions: int = 0
    moves: int = 0
    paused_s: float = 0.0
    """Between two workers."""

    @property
    def work(self) -> StageWork:
        """What it asks for."""
        return self.request.stages[self.stage]

    @property
    def job_id(self) -> str:
        """Request and stage."""
        return f"{self.request.number}.{self.stage}"

    @property
    def context_tokens(self) -> int:
        """To compute before it can go on where nothing is known of it."""
        return self.work.prompt_tokens + int(self.done_tokens)


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """How one stage of a request went; seconds since the request arrived at that stage."""

    number: int
    stage: int
    model: ModelName
    at_s: float
    startup_s: float
    """Until a ready replica took it."""
    waited_s: float
    """Without a replica in all: `startup_s` and what it waited after each preemption."""
    first_token_s: float
    total_s: float
    paused_s: float
    preemptions: int
    moves: int
    output_tokens: int


def outcome_of(job: Job, epoch_s: float) -> StageOutcome:
    """Return what is to be known of a finished job."""
    assert job.finished_s >= job.first_token_s >= job.claimed_s >= job.arrived_s
    return StageOutcome(
        number=job.request.number,
        stage=job.stage,
        model=job.work.model,
        at_s=job.arrived_s - epoch_s,
        startup_s=job.claimed_s - job.arrived_s,
        waited_s=job.waited_s,
        first_token_s=job.first_token_s - job.arrived_s,
        total_s=job.finished_s - job.arrived_s,
        paused_s=job.paused_s,
        preemptions=job.preemptions,
        moves=job.moves,
        output_tokens=job.work.output_tokens,
    )
