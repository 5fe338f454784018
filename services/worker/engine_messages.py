"""Messages between a worker and its engine processes: msgpack frames over one Unix socket pair.

Worker to engine: StartEngine first, then SubmitJob, CancelJob, StopEngine.
Engine to worker: EngineReady or EngineFailed first, then one StepDone per decode step.
A frame is a 4-byte little-endian length and a msgpack body; see `services.worker.frames`.
Both ends are the same program; the length is still checked before it is believed.
"""

import msgspec

from gearfall.core.ids import Epoch, JobId
from gearfall.core.job import TokenRun
from gearfall.core.sampling import SamplingParams


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


class SubmitJob(msgspec.Struct, frozen=True, tag=True):
    """Start or resume a generation: prompt and log are prefilled, the next token follows."""

    job_id: JobId
    epoch: Epoch
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""


class CancelJob(msgspec.Struct, frozen=True, tag=True):
    """Stop (job, epoch) before the next decode step and free its slot."""

    job_id: JobId
    epoch: Epoch


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


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start; the process exits."""

    error: str
    is_corrupt: bool = False


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced, all jobs together; finished runs carry `finish`."""

    runs: tuple[TokenRun, ...]
    running_jobs: int
    waiting_jobs: int
    step_s: float


WorkerMessage = StartEngine | SubmitJob | CancelJob | StopEngine
EngineMessage = EngineReady | EngineFailed | StepDone
