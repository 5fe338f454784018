"""What all choices of one request share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.generation.streaming import Streaming
from gearfall.core.ids import JobId, ModelName, RequestId, RouterId
from services.router.cost_metrics import RequestCosts
from services.router.generation import GenerationEvent, GenerationRequest
from services.router.jobs.job_table import JobTable
from services.router.stages.prospects import RequestProspects
from services.router.stages.stage_run import Note


@dataclass(frozen=True, slots=True)
class RunContext:
    """Of one request, from its admission on."""

    request_id: RequestId
    router_id: RouterId
    router_address: str
    request: GenerationRequest
    measure: str
    calibrations: Mapping[str, Calibration]
    """By model, in place of the measure."""
    judged_tokens: int
    """Of an answer, the first ones that its certainty is measured on; 0: all."""
    agreement_rule: str
    """By which answers are the same, where a stage counts equal ones."""
    counts_all: bool
    """Whether such a stage waits for all of them also where some decide: the certainty of what is
    to be compared is that of plans."""
    seed: int
    deadline_s: float
    """On the loop's clock."""
    deadline_unix_s: float
    patience_s: float
    """How long an append may wait for a queue that can't be reached."""
    jobs: JobTable
    next_job_id: Callable[[], JobId]
    expected_start_s: Callable[[ModelName], float]
    """0 when a replica is ready."""
    start_error: Callable[[ModelName], str | None]
    """Why a model can't start, if so."""
    streaming: Streaming
    prospects: RequestProspects
    costs: RequestCosts
    emit: Callable[[GenerationEvent], None]
    note: Note
