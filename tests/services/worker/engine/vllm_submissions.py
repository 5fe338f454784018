"""Jobs as the worker submits them to the vLLM engine."""

from collections.abc import Sequence
from typing import Any

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine_link.messages import (
    SubmitJob,
)

EPOCH = Epoch(1)
PROMPT = (3, 1, 4)


def submit(job: str, *, tokens: int = 6, generated: Sequence[int] = (), **fields: Any) -> SubmitJob:
    sampling = {"max_tokens": tokens, "temperature": 0.0} | fields.pop("sampling", {})
    params = SamplingParams(**sampling)
    prompt = fields.pop("prompt", PROMPT)
    return SubmitJob(JobId(job), EPOCH, prompt, tuple(generated), params, **fields)
