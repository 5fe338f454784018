"""Who wants to hear what becomes of one claimed job: a migration, on either side."""

from typing import Protocol

from gearfall.core.generation.job import Job, TokenRun
from services.worker.engine_link.messages import JobReport, SubmitJob
from services.worker.jobs.claims import ClaimEvent


class JobFollower(Protocol):
    """Called by the job board on the event loop, before the
    event's effects are performed; must not block."""

    def pushed(self, run: TokenRun) -> None:
        """Tokens of the job were sent to its router."""
        ...

    def reported(self, report: JobReport) -> None:
        """The engine said how the job stands, behind the tokens that came before."""
        ...

    def claim_stepped(self, event: ClaimEvent, reason: str) -> None:
        """Something changed the claim, or its router is connected."""
        ...

    def handed_over(self) -> None:
        """The router made the target of the handover the owner; the claim is stopped next."""
        ...

    def kept(self, reason: str) -> None:
        """The router refused the handover."""
        ...


def submission(job: Job) -> SubmitJob:
    """Return the message that has an engine run `job` under its epoch."""
    return SubmitJob(
        job_id=job.job_id,
        epoch=job.epoch,
        prompt_token_ids=job.prompt_token_ids,
        generated_token_ids=job.generated_token_ids,
        sampling=job.sampling,
        tenant=job.tenant,
        adapter=job.adapter,
        draft_token_ids=job.draft_token_ids,
        priority=job.priority,
        deadline_unix_s=job.deadline_unix_s,
        gather_s=job.gather_s,
    )
