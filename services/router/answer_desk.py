"""What becomes of a request besides its way through the stages: answer cache, watch, shadow share.

The service opens a request here, asks what to run in place of its own way, and says when it ended.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from gearfall.core.gears.drift import cascade_name
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import RequestId
from gearfall.core.records import DeploymentRecord
from services.router.answer_cache import AnswerCache, Flight, Ticket
from services.router.answer_record import AnswerRecord, KeptAnswer, play
from services.router.gears.gear_board import PinnedGear
from services.router.gears.quality_metrics import CacheMetrics
from services.router.gears.quality_watch import QualityWatch
from services.router.gears.shadow import GivenAnswer, Shadow, is_comparable, is_drawn
from services.router.generation import ChoiceEnd, GenerationEvent, GenerationRequest
from services.router.running_request import Run, RunningRequest
from services.router.stages.run_context import RunContext
from services.router.stages.stage_plan import StagePlan

_RULE_WITHOUT_PLAN = "exact"


@dataclass(slots=True)
class _Open:
    """A request that runs."""

    request: GenerationRequest
    deployment: DeploymentRecord
    """With the stages in force."""
    gear: PinnedGear | None
    ticket: Ticket | None
    answer: AnswerRecord | None = None
    context: RunContext | None = None
    last: StagePlan | None = None
    """Set where the answer is to be compared: the last stage's plan of the first prompt."""


class AnswerDesk:
    """Owner of what is remembered of running requests for afterwards."""

    def __init__(
        self, cache: AnswerCache, quality: QualityWatch, shadow: Shadow, metrics: CacheMetrics
    ) -> None:
        self.cache = cache
        self.quality = quality
        self._shadow = shadow
        self._metrics = metrics
        self._open: dict[RequestId, _Open] = {}

    def open(
        self,
        running: RunningRequest,
        request: GenerationRequest,
        deployment: DeploymentRecord,
        gear: PinnedGear | None,
        ticket: Ticket | None,
    ) -> None:
        """A request begins; `ticket` is what the cache said of it."""
        running.take_ticket(ticket)
        self._open[running.request_id] = _Open(request, deployment, gear, ticket)

    def runs(
        self,
        running: RunningRequest,
        own: Callable[[], Awaitable[Sequence[Run]]],
        deadline_s: float,
    ) -> Sequence[Run] | None:
        """Return what to run in place of `own`; None where the request takes its own way."""
        ticket = running.ticket
        if ticket is None:
            return None
        if ticket.answer is not None:
            return (_GivenAgain(ticket.answer, running.emit),)
        flight = self.cache.flight(ticket, deadline_s)
        if flight is None or running.choices > 1:
            self.cache.lead(ticket, deadline_s)
            return None
        lead = partial(self.cache.lead, ticket, deadline_s)
        return (_SharedAnswer(flight, ticket, lead, running.emit, own),)

    def begin(
        self, running: RunningRequest, context: RunContext, plans: Sequence[Sequence[StagePlan]]
    ) -> RunContext:
        """The request takes its own way: see to it that its answer is there when it ended.

        Returns the context to run it in.
        """
        held = self._open.get(running.request_id)
        if held is None:  # cancelled while its prompt was read
            return context
        stages = len(held.deployment.stages)
        is_fit = is_comparable(held.request, stages) and _is_promised(held.deployment, held.gear)
        if is_fit and is_drawn(running.request_id, held.deployment, has_plan=held.gear is not None):
            context = replace(context, counts_all=True)
            held.context, held.last = context, plans[0][-1]
        if held.context is not None or held.ticket is not None:
            held.answer = running.answer = AnswerRecord()
        return context

    def ended(self, running: RunningRequest) -> None:
        """The request ended, one way or another."""
        held = self._open.pop(running.request_id)
        if held.ticket is not None:
            self._settle(running, held, held.ticket)
        if held.gear is not None and _is_promised(held.deployment, held.gear):
            for end in running.ends.values():
                self.quality.answered(held.deployment.name, held.gear, end)
        if held.answer is not None and held.context is not None and held.last is not None:
            self._compare(running, held, held.answer, held.context, held.last)

    def show(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.show(self.cache.sizes())

    def _settle(self, running: RunningRequest, held: _Open, ticket: Ticket) -> None:
        name = held.deployment.name
        if ticket.answer is not None:
            outcome = "hit" if running.is_from_cache else "joined"
            self._metrics.spared_flops.labels(name).inc(ticket.answer.cost_flops)
        else:
            outcome = "miss"
            kept = None
            if running.error is None and not running.is_cancelled and held.answer is not None:
                kept = held.answer.kept(running.ends, running.choices)
            self.cache.land(ticket, kept)
        self._metrics.requests.labels(name, outcome).inc()

    def _compare(
        self,
        running: RunningRequest,
        held: _Open,
        answer: AnswerRecord,
        context: RunContext,
        last: StagePlan,
    ) -> None:
        """Compare the first choice, if a lower stage gave it and was certain."""
        end = running.ends.get(0)
        stages = held.deployment.stages
        if end is None or running.is_cancelled or not _is_fair(end, stages[-1].model):
            return
        given = next(report for report in end.stages if report.is_accepted)
        gear = held.gear
        self._shadow.compare(
            GivenAnswer(
                deployment=held.deployment.name,
                cascade=cascade_name(gear.planned if gear else stages),
                gear=gear,
                stage=next(at for at, stage in enumerate(stages) if stage.model == given.model),
                model=given.model,
                certainty=given.certainty or 0.0,
                text=answer.text(0),
                rule=gear.agreement_rule if gear else _RULE_WITHOUT_PLAN,
            ),
            context,
            last,
        )


@dataclass(frozen=True, slots=True)
class _GivenAgain:
    """In place of a request's own way: an answer that is there."""

    answer: KeptAnswer
    emit: Callable[[GenerationEvent], None]

    async def run(self) -> None:
        """Give the answer."""
        play(self.answer, self.emit)


@dataclass(frozen=True, slots=True)
class _SharedAnswer:
    """In place of a request's own way: an answer that another one computes."""

    flight: Flight
    ticket: Ticket
    lead: Callable[[], None]
    """Compute it for others, unless somebody does already."""
    emit: Callable[[GenerationEvent], None]
    own: Callable[[], Awaitable[Sequence[Run]]]

    async def run(self) -> None:
        """Give the answer; go the request's own way where the other one comes to nothing.

        It waits once: with answers that can't be given to others, as flagged ones, all that came at
        once would be computed one after another else.
        """
        self.ticket.answer = await self.flight.answer()
        if self.ticket.answer is not None:
            play(self.ticket.answer, self.emit)
            return
        self.lead()
        for run in await self.own():
            await run.run()


def _is_promised(deployment: DeploymentRecord, gear: PinnedGear | None) -> bool:
    """Whether plans speak about its answers: not where one is decided on a beginning that the plan
    does not know of."""
    is_beginning = gear is not None and gear.hold_tokens > 0
    return is_beginning or deployment.streaming.mode is not StreamMode.EARLY


def _is_fair(end: ChoiceEnd, last: str) -> bool:
    """Whether a lower stage answered, as the cascade means it."""
    is_given = any(report.is_accepted for report in end.stages)
    return is_given and end.degraded is None and end.model != last
