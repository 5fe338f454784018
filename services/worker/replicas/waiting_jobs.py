"""What waits for a model whose engine is about to start."""

import logging

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName
from gearfall.core.ports import JobQueue
from services.worker.engine_link.messages import SubmitJob
from services.worker.jobs.job_follower import submission
from services.worker.replicas.replica_start import within

LOOK_TIMEOUT_S = 0.2
"""A start waits no longer for it: the jobs are claimed later all the same."""

_log = logging.getLogger(__name__)


async def find_waiting(queue: JobQueue, model: ModelName, slots: int) -> tuple[SubmitJob, ...]:
    """Return up to `slots` jobs that nobody has claimed; none while the queue can't be asked."""
    try:
        jobs = await within(LOOK_TIMEOUT_S, queue.peek(model, max_jobs=slots), "the queue's answer")
    except GearfallError as error:
        _log.warning("cannot look ahead", extra={"model": model, "error": error.message})
        return ()
    return tuple(map(submission, jobs))
