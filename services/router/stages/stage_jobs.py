"""Puts a stage's jobs into its model's queue: one, or one for each answer that it counts."""

import asyncio
import contextlib
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gearfall.core.errors import GearfallError
from gearfall.core.generation.job import GATHER_S, Job
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.router.generation import GenerationRequest, Wait
from services.router.stages.counted_run import CountedRun
from services.router.stages.drafting import draft_of
from services.router.stages.run_context import RunContext
from services.router.stages.stage_plan import StageReady
from services.router.stages.stage_run import StageRun

_SEEDS_APART = 2**32
"""Between the answers that one stage draws: no two choices of a request draw the same."""

AnyRun = StageRun | CountedRun
AskedJob = tuple[JobId, StageRun]
"""One job of a stage with its listener."""


@dataclass(frozen=True, slots=True)
class Below:
    """The last stage that said something: its answer goes up as a draft."""

    plan: StageReady
    token_ids: Sequence[int]


class StageJobs:
    """One choice's."""

    def __init__(self, context: RunContext, choice: int) -> None:
        self._context = context
        self._choice = choice

    @contextlib.contextmanager
    def submitting(
        self,
        plan: StageReady,
        stage_run: AnyRun,
        asked: Sequence[AskedJob],
        below: Below | None,
        *,
        is_shown: bool,
    ) -> Iterator[None]:
        """Submit the stage's jobs meanwhile; the stage may end while the queue can't be reached.

        `is_shown`: the client may see tokens as they come.
        """

        def pass_on(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not stage_run.ended.done():
                stage_run.ended.set_exception(error)

        submitting = asyncio.create_task(
            self._submit(plan, stage_run, asked, below, 0.0 if is_shown else GATHER_S),
            name=f"submit-{asked[0][0]}",
        )
        submitting.add_done_callback(pass_on)
        try:
            yield
        finally:
            submitting.cancel()

    async def _submit(
        self,
        plan: StageReady,
        stage_run: AnyRun,
        asked: Sequence[AskedJob],
        below: Below | None,
        gather_s: float,
    ) -> None:
        context, model = self._context, plan.host.name
        expected_s = context.expected_start_s(model)
        if expected_s > 0:
            stage_run.start_s = context.prospects.charge_start(plan)
            context.costs.started(stage_run.start_s)
        waits = f"start expected in {expected_s:.2f} s" if expected_s > 0 else "a replica is ready"
        context.note("queued", f"{model}, {waits}", model=model, predicted_s=expected_s)
        if expected_s > 0:
            context.emit(Wait(self._choice, model, expected_s))
        draft = await self._draft(plan, below)
        try:
            for number, (job_id, listener) in enumerate(asked):
                job = self._job(plan, job_id, number, draft, gather_s)
                await context.jobs.submit(
                    job,
                    listener,
                    deadline_s=context.deadline_s,
                    patience_s=context.patience_s,
                    is_new=below is None,  # else the client has waited for a stage's answer
                )
        except GearfallError as error:
            stage_run.on_failed(error)

    def _job(
        self,
        plan: StageReady,
        job_id: JobId,
        number: int,
        draft_token_ids: tuple[int, ...],
        gather_s: float,
    ) -> Job:
        context = self._context
        return Job(
            job_id=job_id,
            request_id=context.request_id,
            model=plan.host.name,
            epoch=Epoch(1),
            router_id=context.router_id,
            router_address=context.router_address,
            prompt_token_ids=plan.prompt_token_ids,
            generated_token_ids=(),
            sampling=sampling_of(plan, context.request, context.seed, self._choice, number),
            deadline_unix_s=context.deadline_unix_s,
            priority=context.request.priority,
            tenant=context.request.tenant,
            adapter=plan.adapter,
            draft_token_ids=draft_token_ids,
            gather_s=gather_s,
        )

    async def _draft(self, plan: StageReady, below: Below | None) -> tuple[int, ...]:
        if below is None:
            return ()
        request = self._context.request
        prompt = request.prompts[self._choice // request.n]
        return await draft_of(below.plan, below.token_ids, plan, prompt)


def sampling_of(
    plan: StageReady, request: GenerationRequest, seed: int, choice: int, number: int
) -> SamplingParams:
    """Return the sampling of a stage's answer `number`: all but the first are drawn as it says.

    Choices of one prompt differ; the same choice of another prompt draws the same, but for answers
    that are drawn to be counted: numbers that all prompts shared would make the same mistakes
    everywhere. A greedy request without a seed has the same answers whenever it comes.
    """
    several, seed = plan.stage.self_consistency, seed + choice % request.n
    if several is None or number == 0:
        return plan.sampling(request, seed % 2**64)
    if request.temperature == 0.0 and request.seed is None:
        seed = 0
    drawn = replace(request, temperature=several.temperature)
    own = seed + number * _SEEDS_APART + _seed_of(plan.prompt_token_ids)
    return plan.sampling(drawn, own % 2**64)


def _seed_of(token_ids: Sequence[int]) -> int:
    content = array("Q", token_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
