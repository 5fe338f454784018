"""Asks the last stage too, afterwards, for a share of the answers that a lower stage gave.

So it is known how often both agree, in use and not only on the plan's queries. The client has its
reply by then and pays nothing; the job is one of batch priority, at most MAX_AT_ONCE at a router,
and is not asked at all while there is no ready replica, jobs wait, or the router is half full.
Only greedy answers are compared: of two draws nobody expects that they are the same. The prompt
goes where the request might have gone by itself, under its tenant; of the texts nothing is kept.
"""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gearfall.core.certainty.agreement import answer_key
from gearfall.core.certainty.escalation import Degraded
from gearfall.core.errors import GearfallError
from gearfall.core.gears.drift import Compared
from gearfall.core.generation.job import Priority
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord
from services.router.answer_record import AnswerRecord
from services.router.background import Background
from services.router.cost_metrics import RequestCosts
from services.router.gears.gear_board import PinnedGear
from services.router.gears.quality_metrics import QualityMetrics
from services.router.generation import ChoiceEnd, GenerationEvent, GenerationRequest
from services.router.stages.choice_run import ChoiceRun
from services.router.stages.run_context import RunContext
from services.router.stages.stage_plan import StagePlan

MAX_AT_ONCE = 2
SHARE_OF_PLANS = 0.01
"""Where the deployment says nothing."""
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """What a lower stage answered."""

    deployment: DeploymentName
    cascade: str
    gear: PinnedGear | None
    stage: int
    model: str
    certainty: float
    text: str
    rule: str


def is_drawn(request_id: str, deployment: DeploymentRecord, *, has_plan: bool) -> bool:
    """Whether the answer to a request is to be compared: the same for the same id, ever."""
    share = deployment.shadow_share
    if share is None:
        share = SHARE_OF_PLANS if has_plan else 0.0
    drawn = hashlib.blake2b(request_id.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(drawn) < share * 2**64


def is_comparable(request: GenerationRequest, stages: int) -> bool:
    """Whether another stage's answer to it says anything."""
    return stages > 1 and request.temperature == 0.0


class Shadow:
    """Owner of the comparisons that run."""

    def __init__(
        self,
        background: Background,
        metrics: QualityMetrics,
        *,
        hindrance: Callable[[ModelName], str],
        on_compared: Callable[[DeploymentName, PinnedGear, int, Compared], None],
    ) -> None:
        """`hindrance`: in a word why a model must not be asked now; empty if it may."""
        self._background = background
        self._metrics = metrics
        self._hindrance = hindrance
        self._on_compared = on_compared
        self._running = 0

    def compare(self, given: GivenAnswer, context: RunContext, last: StagePlan) -> None:
        """Ask the last stage the prompt of an answer, unless there is something better to do."""
        why_not = self._hindrance(last.stage.model)
        if self._running >= MAX_AT_ONCE:
            why_not = "busy"
        if why_not:
            self._count(given, why_not)
            return
        self._running += 1
        self._background.spawn(self._ask(given, context, last), "shadow")

    async def _ask(self, given: GivenAnswer, context: RunContext, last: StagePlan) -> None:
        answer, ends = AnswerRecord(), list[ChoiceEnd]()

        def take(event: GenerationEvent) -> None:
            answer.take(event)
            if isinstance(event, ChoiceEnd):
                ends.append(event)

        try:
            async with asyncio.timeout(_ANSWER_S):
                costs = _ShadowCosts(self._metrics, given.deployment)
                await ChoiceRun(_of_its_own(context, take, costs), 0, (last,)).run()
        except (GearfallError, TimeoutError):
            self._count(given, "failed")
            return
        finally:
            self._running -= 1
            self._bill(given, ends)
        agreed = answer_key(answer.text(0), given.rule) == answer_key(given.text, given.rule)
        self._count(given, "agreed" if agreed else "disagreed")
        said = "the same" if agreed else "something else"
        context.note("compared", f"{last.stage.model} answers {said}", model=last.stage.model)
        if given.gear is not None:
            compared = Compared(given.certainty, agreed)
            self._on_compared(given.deployment, given.gear, given.stage, compared)

    def _count(self, given: GivenAnswer, outcome: str) -> None:
        labels = (given.deployment, given.cascade, given.model, outcome)
        self._metrics.shadow.labels(*labels).inc()

    def _bill(self, given: GivenAnswer, ends: Sequence[ChoiceEnd]) -> None:
        name, tokens = given.deployment, self._metrics.shadow_tokens
        for end in ends:
            tokens.labels(name, "prompt").inc(end.usage.total_prompt_tokens)
            tokens.labels(name, "completion").inc(end.usage.total_completion_tokens)


@dataclass(frozen=True, slots=True)
class _ShadowCosts:
    """Of one comparison: no tenant's, and not the deployment's requests'."""

    metrics: QualityMetrics
    deployment: DeploymentName

    def spent(self, stage: str, device_s: float, flops: float) -> None:  # noqa: ARG002
        """The last stage is over, however it ended."""
        self.metrics.shadow_device_s.labels(self.deployment).inc(device_s)
        self.metrics.shadow_cost_flops.labels(self.deployment).inc(flops)

    def started(self, start_s: float) -> None:
        """Nothing: a model without a ready replica is not asked."""

    def degraded(self, reason: Degraded) -> None:
        """Nothing: the answer goes to nobody."""


def _of_its_own(
    context: RunContext, emit: Callable[[GenerationEvent], None], costs: RequestCosts
) -> RunContext:
    """Return the context of a job that serves no client."""
    request = replace(context.request, priority=Priority.BATCH, n=1, logprobs=False, top_logprobs=0)
    return replace(
        context,
        request=request,
        deadline_s=asyncio.get_running_loop().time() + _ANSWER_S,
        deadline_unix_s=time.time() + _ANSWER_S,
        patience_s=0.0,
        costs=costs,
        emit=emit,
        note=_unnoted,
    )


def _unnoted(
    decision: str,
    reason: str,
    *,
    model: str = "",
    predicted_s: float = 0.0,
    measured_s: float = 0.0,
) -> None:
    """The request's own story ended with its reply."""
