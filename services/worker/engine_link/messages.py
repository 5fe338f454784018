"""Messages between a worker and its engine processes: msgpack frames over one Unix socket pair.

Worker to engine: StartEngine first, then SubmitJob, CancelJob, StopEngine, for LoRA adapters
AttachAdapter and DropAdapter, and for migrations HoldJob, FeedJob, ReleaseJob (at the target),
PinJob, FreezeJob, ThawJob, UnpinJob (at the source).
Engine to worker: EngineReady or EngineFailed first, then one StepDone per decode step, in which the
reports about held, pinned and frozen jobs travel behind the tokens that came before them.
A frame is a 4-byte little-endian length and a msgpack body; see `frames`.
Both ends are the same program; the length is still checked before it is believed.
"""

from enum import Enum

import msgspec

from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.job import Priority, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine_link.kv_layout import KvLayout


class EngineKind(Enum):
    """What computes a model."""

    GEARFALL = "gearfall"
    VLLM = "vllm"
    """vLLM, for GPUs; see `services.worker.engine.vllm`."""


class StartEngine(msgspec.Struct, frozen=True, tag=True):
    """Build the model over the mapped checkpoint (its descriptors travel beside this message)."""

    model: str
    manifest_json: bytes
    """The checkpoint's manifest, as the store verified it."""
    config_json: bytes
    generation_config_json: bytes
    """Empty when the checkpoint has none."""
    device: str
    threads: int
    slots: int
    """Most jobs in the running batch."""
    kv_tokens: int
    """KV cache capacity in tokens, all jobs together."""
    canary_json: bytes = b""
    """What the model must answer before it serves; an engine without one refuses to start."""
    is_loading: bool = False
    """Whether the checkpoint is still being loaded; news of it come on the last descriptor."""
    engine: EngineKind = EngineKind.GEARFALL
    arithmetic: Arithmetic = Arithmetic.EXACT
    """How a CPU's engine multiplies, once it has answered its canary exactly."""
    expected: "tuple[SubmitJob, ...]" = ()
    """Jobs that wait for the model, nobody's yet: their first tokens are computed with the canary
    and kept, without a word, for the SubmitJob of one that comes here."""


class SubmitJob(msgspec.Struct, frozen=True, tag=True):
    """Start or resume a generation: prompt and log are prefilled, the next token follows."""

    job_id: JobId
    epoch: Epoch
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    priority: Priority = Priority.INTERACTIVE
    deadline_unix_s: float = 0.0
    """0 means none."""
    adapter: str = ""
    """LoRA adapter that it runs with, empty for none: its name on the way to
    `services.worker.processes.adapter_engine`, its digest from there on, so that what is cached of
    a job is never taken for another adapter's that bears the same name."""
    draft_token_ids: tuple[int, ...] = ()
    """A guess at the whole answer. What continues the log is verified; it changes no token."""
    gather_s: float = 0.0
    """See `Job.gather_s`. An engine that tells each step at once may ignore it."""


class AttachAdapter(msgspec.Struct, frozen=True, tag=True):
    """Map a LoRA adapter (its partitions' descriptors travel beside this message) and keep it.

    Answered with an AdapterReport. A second one of the same digest changes nothing.
    """

    adapter: str
    """Digest of its manifest."""
    name: str
    manifest_json: bytes
    config_json: bytes
    """Its adapter_config.json."""


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Let go of an adapter as soon as no job runs with it. Idempotent, not answered."""

    adapter: str


class CancelJob(msgspec.Struct, frozen=True, tag=True):
    """Stop (job, epoch) before the next decode step and free its slot.

    A held, pinned or frozen job is dropped like any other, and its blocks go to others: the worker
    must have stopped reading and writing them.
    """

    job_id: JobId
    epoch: Epoch


class HoldJob(msgspec.Struct, frozen=True, tag=True):
    """Take in a job that another worker still owns: compute its tokens, sample nothing.

    It gets a slot and blocks at once or is refused; it is never preempted. Answered with a
    JobReport: HELD, or REFUSED with the reason. One that is held already is reported again.
    """

    job: SubmitJob
    """Prompt and log so far, under the epoch in which it will run here."""
    by_kv: bool = False
    """Keys and values are put into its blocks by the worker; the engine computes none of them
    before ReleaseJob."""
    reserve_tokens: int = 0
    """Blocks for so many more tokens are set aside at once, so that feeding them can't fail."""
    patience_s: float = 0.0
    """So soon its tokens are to be computed, even if those that decode wait for it; 0: whenever
    that makes their steps hardly longer."""


class FeedJob(msgspec.Struct, frozen=True, tag=True):
    """What came since about a held job: more tokens, and how far the worker has put in the KV.

    Answered with a JobReport: HELD with the blocks as they are now, or REFUSED with the reason,
    then nothing of the message was done and the job is held as before, for CancelJob to end.
    """

    job_id: JobId
    epoch: Epoch
    index: int
    """Index of the first of `token_ids` in the answer; what is known already is skipped, a gap is
    refused."""
    token_ids: tuple[int, ...] = ()
    kv_tokens: int = 0
    """Tokens from the prompt's first on whose keys and values lie in the blocks; only with
    `by_kv`. Less than before changes nothing."""


class ReleaseJob(msgspec.Struct, frozen=True, tag=True):
    """Run a held job from now on: what is missing is computed, then tokens flow as usual.

    Answered with a JobReport: RUNNING, or GONE.
    """

    job_id: JobId
    epoch: Epoch


class PinJob(msgspec.Struct, frozen=True, tag=True):
    """Keep a running job's blocks: no preemption, and they outlive its end until UnpinJob.

    Answered with a JobReport, and another after each step in which a block became full; GONE when
    the job isn't here. One that still waits for room is WAITING, and reported again when it runs.
    """

    job_id: JobId
    epoch: Epoch


class FreezeJob(msgspec.Struct, frozen=True, tag=True):
    """Stop a running job at a token boundary, pinned: nothing of it is computed until ThawJob.

    Answered with a JobReport: FROZEN behind the last token's run, so that `next_index` is what the
    worker has received; or GONE when it ended before.
    """

    job_id: JobId
    epoch: Epoch


class ThawJob(msgspec.Struct, frozen=True, tag=True):
    """Let a frozen job go on. It stays pinned. Idempotent, answered with a JobReport."""

    job_id: JobId
    epoch: Epoch


class UnpinJob(msgspec.Struct, frozen=True, tag=True):
    """Undo PinJob; the blocks of a job that has ended are freed. Idempotent, not answered."""

    job_id: JobId
    epoch: Epoch


class ProbeEngine(msgspec.Struct, frozen=True, tag=True):
    """Say that you are there: answered with a StepDone after the current step, if any."""


class StopEngine(msgspec.Struct, frozen=True, tag=True):
    """Exit after the current step."""


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The model is built and has answered its canary as recorded."""

    pid: int
    attach_s: float
    build_s: float
    first_token_s: float
    kv_bytes: int
    """Bytes of KV cache that were allocated."""
    kv_layout: KvLayout | None = None
    """Where a block lies in the memory whose descriptor comes beside this message; None where the
    cache can't be shared (a GPU's)."""
    arithmetic: str = ""
    """What its tokens' bits hang on: engines of one checkpoint and one arithmetic give the same.
    Empty where they are not promised."""
    needs_pool: bool = True
    """Whether it computes over the leased memory. If not, it has a verified copy of its own and has
    unmapped that."""


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start; the process exits."""

    error: str
    is_corrupt: bool = False


class JobPhase(Enum):
    """What becomes of a job in this engine."""

    WAITING = "waiting"
    """It has no slot at the moment."""
    RUNNING = "running"
    HELD = "held"
    FROZEN = "frozen"
    ENDED = "ended"
    """It has ended, but is pinned: the blocks of `block_table` are still there."""
    GONE = "gone"
    """It isn't here: never was, has ended, or was cancelled."""
    REFUSED = "refused"
    """It can't be held or fed as was asked; `error` says why."""


class JobReport(msgspec.Struct, frozen=True, tag=True):
    """Where a job stands in this engine after a step."""

    job_id: JobId
    epoch: Epoch
    phase: JobPhase
    next_index: int = 0
    """Index of the next generated token: those before it are in the engine's log of the job."""
    computed_tokens: int = 0
    """Tokens from the prompt's first on whose keys and values are in the blocks."""
    block_table: tuple[int, ...] = ()
    """Its blocks in order: token t lies in block `block_table[t // block_tokens]`. Of a held job,
    blocks that are full of `computed_tokens` may be shared with other jobs: never write to them."""
    error: str = ""


class AdapterReport(msgspec.Struct, frozen=True, tag=True):
    """An adapter was attached, or, with `error`, could not be: its jobs end with that error."""

    adapter: str
    error: str = ""


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced, all jobs together; finished runs carry `finish`.

    Steps that brought nothing but tokens which may wait (`SubmitJob.gather_s`) are told with it.
    """

    runs: tuple[TokenRun, ...]
    running_jobs: int
    waiting_jobs: int
    step_s: float
    reports: tuple[JobReport, ...] = ()
    """Each held job that advanced, and the answers to what was asked about jobs; they hold after
    `runs`. The answers come at once, in a message of their own before the next step is computed."""
    adapters: tuple[AdapterReport, ...] = ()
    kv_blocks: int = 0
    """Blocks of the KV cache."""
    kv_used_blocks: int = 0
    """Of those, blocks that jobs have; the others are empty or kept for who begins alike."""
    earlier_step_s: tuple[float, ...] = ()
    """Of each step before it that is told with it: `step_s`."""
    slowdown: float = 0.0
    """How much longer its steps take lately than they did at their best; 0 while unknown."""


WorkerMessage = (
    StartEngine
    | SubmitJob
    | AttachAdapter
    | DropAdapter
    | CancelJob
    | HoldJob
    | FeedJob
    | ReleaseJob
    | PinJob
    | FreezeJob
    | ThawJob
    | UnpinJob
    | ProbeEngine
    | StopEngine
)
EngineMessage = EngineReady | EngineFailed | StepDone
