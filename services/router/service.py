"""One service behind both doors: resolves, validates, admits, and runs requests."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from gearfall.core.certainty.agreement import EXACT
from gearfall.core.deployment import check_stream_mode
from gearfall.core.errors import Conflict, GearfallError, InvalidRequest, NotFound, Overloaded
from gearfall.core.generation.job import Priority
from gearfall.core.generation.streaming import resolve_streaming
from gearfall.core.ids import DeploymentName, JobId, ModelName, RequestId, RouterId
from gearfall.core.records import DeploymentRecord
from gearfall.infra.state.cluster import Cluster
from services.router.admission import Admission
from services.router.answer_desk import AnswerDesk
from services.router.cluster.resolving import resolve
from services.router.gears.gear_board import GearBoard, PinnedGear
from services.router.generation import GenerationRequest
from services.router.jobs.job_table import JobTable
from services.router.jobs.starts import StartHistory, expected_start_s, is_ready
from services.router.metrics import RouterMetrics
from services.router.request_log import RequestEvent, RequestLog
from services.router.running_request import RunningRequest
from services.router.stages.choice_run import ChoiceRun, cannot_start
from services.router.stages.prospects import Prospects, ScheduleWishes
from services.router.stages.run_context import RunContext
from services.router.stages.stage_plan import DEFAULT_MAX_TOKENS, plan_stages, prompt_tokens
from services.router.text.tokenizing import TokenizerCache

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Limits that an operator may change."""

    max_choices: int = 8192
    """Answers that may be generated or wait at once; above it requests are refused."""
    default_timeout_s: float = 600.0
    """Deadline of a request that names none."""
    queue_patience_s: float = 10.0
    """How long a new request waits for a queue that can't be reached."""
    entry_check_s: float = 1.0
    """Age from which a waiting job's queue entry is checked, and how often."""
    stop_grace_s: float = 5.0
    """What running requests get when the router stops."""


class RouterService:
    """Runs requests. `run()` keeps the background work going until cancelled."""

    def __init__(
        self,
        *,
        router_id: RouterId,
        cluster: Cluster,
        jobs: JobTable,
        tokenizers: TokenizerCache,
        metrics: RouterMetrics,
        gears: GearBoard,
        desk: AnswerDesk,
        wishes: ScheduleWishes,
        draw_seed: Callable[[], int],
        draw_id: Callable[[], str],
        limits: RouterLimits,
    ) -> None:
        """`draw_seed`: 63 random bits. `draw_id`: unique text for a request without an id."""
        self.router_id = router_id
        self.address = ""
        """host:port of the TokenSink as workers reach it; set before the first request."""
        self.admission = Admission(limits.max_choices)
        self.request_log = RequestLog()
        self.metrics = metrics
        self.gears = gears
        self.desk = desk
        self._cluster = cluster
        self._jobs = jobs
        self._tokenizers = tokenizers
        self._draw_seed = draw_seed
        self._draw_id = draw_id
        self._limits = limits
        self._starts = StartHistory()
        self._wishes = wishes
        self.prospects = Prospects(self, wishes, clock=time.monotonic)
        metrics.costs.follow(self.prospects.shares)
        self._running: dict[RequestId, RunningRequest] = {}
        self._job_count = 0
        self.is_stopping = False
        """Whether new requests are refused, while those that run get their grace."""

    @property
    def running_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._running)

    async def start(self, request: GenerationRequest) -> RunningRequest:
        """Check and admit `request` and start its choices; iterate and close what is returned.

        Raises InvalidRequest, NotFound (code model_not_found), Conflict (request id in use),
        Overloaded with a time to come back, Unavailable. Nothing is queued when it raises.
        """
        if self.is_stopping:
            raise Overloaded("this router is stopping", retry_after_s=1.0)
        deployment = resolve(self._cluster.view, request.model)
        try:
            running, deployment, gear = self._admit(request, deployment)
        except GearfallError as error:
            self.metrics.requests.labels(deployment.name, type(error).__name__).inc()
            raise
        try:
            await self._start_choices(running, request, deployment, gear)
        except BaseException as error:
            running.error = error if isinstance(error, GearfallError) else None
            running.close()
            raise
        return running

    def cancel(self, request_id: str) -> None:
        """Stop a request; NotFound when it is not running."""
        running = self._running.get(RequestId(request_id))
        if running is None:
            raise NotFound(f"request {request_id!r} is not running")
        running.cancel()

    def readiness(self, model: ModelName) -> tuple[bool, bool]:
        """Whether `model`, or an adapter's base, has a ready replica, and whether one is coming."""
        model = self._cluster.view.host_of(model)
        replicas = [each for each in self._cluster.view.replicas.values() if each.model == model]
        return is_ready(model, replicas), bool(replicas) or self.is_starting(model)

    def is_ready(self, model: ModelName) -> bool:
        """Whether a ready replica of `model` is known."""
        return is_ready(model, self._cluster.view.replicas.values())

    def is_starting(self, model: ModelName) -> bool:
        """Whether a replica of `model` is on its way."""
        return any(each.model == model for each in self._cluster.view.assignments.values())

    def hindrance(self, model: ModelName) -> str:
        """Say why `model` must not be asked what can be left out; empty if it may."""
        host = self._cluster.view.host_of(model)
        if not self.is_ready(host):
            return "cold"
        is_full = 2 * self.admission.running_choices > self.admission.max_choices
        return "busy" if is_full or self._jobs.waiting(host) else ""

    def expected_start_s(self, model: ModelName) -> float:
        """Seconds to the first token if `model` were asked for now; 0 when a replica is ready."""
        view = self._cluster.view
        model = self._cluster.view.host_of(model)
        record = view.models.get(model)
        if record is None or self.is_ready(model):
            return 0.0
        return expected_start_s(
            record,
            nodes=view.nodes.values(),
            assignments=view.assignments.values(),
            history=self._starts,
            now_unix_s=time.time(),
        )

    async def run(self) -> None:
        """Follow replicas and look after waiting queue entries, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_replicas())
            group.create_task(self._guard_entries())

    async def stop(self) -> None:
        """Refuse new requests, give running ones a short grace, then end them."""
        self.is_stopping = True
        running = list(self._running.values())
        waits = [asyncio.create_task(each.wait_stopped()) for each in running]
        if waits:
            await asyncio.wait(waits, timeout=self._limits.stop_grace_s)
        for each in running:
            each.fail(Overloaded("this router is stopping", retry_after_s=1.0))
        await asyncio.gather(*waits)
        await self._tokenizers.stop()

    def _admit(
        self, request: GenerationRequest, deployment: DeploymentRecord
    ) -> tuple[RunningRequest, DeploymentRecord, PinnedGear | None]:
        """Return the request with what it runs by: the deployment as it is in force, and gear."""
        gear = self.desk.quality.pin(deployment.name)
        if gear is not None:
            deployment = replace(deployment, stages=gear.stages, certainty=gear.certainty)
        streaming = resolve_streaming(
            deployment.streaming,
            request.stream_mode,
            request.hold_tokens,
            gear.hold_tokens if gear else 0,
        )
        check_stream_mode(deployment.stages, streaming.mode, "stream_mode")
        if streaming != deployment.streaming:
            deployment = replace(deployment, streaming=streaming)
        request_id = RequestId(request.request_id or self._draw_id())
        if request_id in self._running:
            raise Conflict(f"request {request_id} is running already", param="request_id")
        ticket = self.desk.cache.ticket(request, deployment, gear)
        if ticket is None or ticket.answer is None:
            self.admission.enter(request.choices)
        running = RunningRequest(
            request_id,
            deployment=request.model,
            seed=self._draw_seed() if request.seed is None else request.seed,
            choices=request.choices,
            on_end=self._on_end,
        )
        self._running[request_id] = running
        self._note(request_id, "admitted", f"{request.model}, {request.choices} choices")
        self.desk.open(running, request, deployment, gear, ticket)
        return running, deployment, gear

    async def _start_choices(
        self,
        running: RunningRequest,
        request: GenerationRequest,
        deployment: DeploymentRecord,
        gear: PinnedGear | None,
    ) -> None:
        context = self._context(running, request, deployment, gear)
        running.gear = gear
        own = partial(self._own_runs, running, context, deployment)
        runs = self.desk.runs(running, own, context.deadline_s) or await own()
        running.start(runs, context.deadline_s)

    async def _own_runs(
        self, running: RunningRequest, context: RunContext, deployment: DeploymentRecord
    ) -> list[ChoiceRun]:
        """Return the request's own way through the stages, planned and checked."""
        request, models = context.request, self._cluster.view.models
        # A batch request takes idle capacity only: it can wait for its tokenizer first.
        if request.priority is not Priority.BATCH:
            self._want_early(deployment.stages[0].model, request.max_tokens or DEFAULT_MAX_TOKENS)
        plans = [
            await plan_stages(request, prompt, deployment.stages, models, self._tokenizers)
            for prompt in request.prompts
        ]
        for each in plans:
            self.gears.arrived(deployment.name, request.n * prompt_tokens(each))
        if asyncio.get_running_loop().time() >= context.deadline_s:
            raise InvalidRequest("the timeout is too short to read the prompt", param="timeout_s")
        running.expected_start_s = self.expected_start_s(deployment.stages[0].model)
        context = self.desk.begin(running, context, plans)
        return [
            ChoiceRun(context, choice, plans[choice // request.n])
            for choice in range(request.choices)
        ]

    def _want_early(self, model: ModelName, max_tokens: int) -> None:
        """Have a cold model started beside the reading of its tokenizer, which may take seconds.

        In vain where the prompt turns out to be none that it can take.
        """
        view = self._cluster.view
        record, host = view.models.get(model), view.models.get(view.host_of(model))
        if record is None or host is None or self._tokenizers.has(host) or self.is_ready(host.name):
            return
        if self._starts.error_of(host.name) is None:
            self._wishes.want_early(host.name, min(max_tokens, record.context_tokens))

    def _context(
        self,
        running: RunningRequest,
        request: GenerationRequest,
        deployment: DeploymentRecord,
        gear: PinnedGear | None,
    ) -> RunContext:
        timeout_s = request.timeout_s or self._limits.default_timeout_s
        request_id = running.request_id
        return RunContext(
            request_id=request_id,
            router_id=self.router_id,
            router_address=self.address,
            request=request,
            measure=deployment.certainty,
            calibrations=gear.calibrations if gear else {},
            judged_tokens=gear.hold_tokens if gear else 0,
            agreement_rule=gear.agreement_rule if gear else EXACT,
            counts_all=False,
            seed=running.seed,
            deadline_s=asyncio.get_running_loop().time() + timeout_s,
            deadline_unix_s=time.time() + timeout_s,
            patience_s=self._limits.queue_patience_s,
            jobs=self._jobs,
            next_job_id=self._next_job_id,
            expected_start_s=self.expected_start_s,
            start_error=self._starts.error_of,
            streaming=deployment.streaming,
            prospects=self.prospects.for_request(
                deployment.name,
                deployment.escalation,
                gear.promise.p95_s if gear else 0.0,
                gear.planned_up if gear else {},
                is_batch=request.priority is Priority.BATCH,
            ),
            costs=self.metrics.costs.for_request(running.deployment, request.tenant),
            emit=running.emit,
            note=partial(self._note, request_id),
        )

    def _next_job_id(self) -> JobId:
        self._job_count += 1
        return JobId(f"{self.router_id}-{self._job_count}")

    def _note(
        self,
        request_id: RequestId,
        decision: str,
        reason: str,
        *,
        model: str = "",
        predicted_s: float = 0.0,
        measured_s: float = 0.0,
    ) -> None:
        event = RequestEvent(time.time(), decision, reason, model, predicted_s, measured_s)
        self.request_log.add(request_id, event)

    def _on_end(self, running: RunningRequest) -> None:
        duration_s = time.perf_counter() - running.started_s
        self._running.pop(running.request_id, None)
        if not running.is_from_cache:
            self.admission.leave(running.choices, duration_s)
        outcome = _outcome(running)
        if running.cache == "hit":
            self._note(running.request_id, "given again", "an equal request was answered before")
        self._note(running.request_id, outcome, f"after {duration_s:.3f} s", measured_s=duration_s)
        self._measure(running, outcome, duration_s)
        for end in running.ends.values() if running.cache != "hit" else ():
            name = DeploymentName(running.deployment)
            self.gears.answered(name, end.usage.completion_tokens)
        self.desk.ended(running)
        _log.info(
            "request ended",
            extra={
                "request_id": running.request_id,
                "model": running.deployment,
                "outcome": outcome,
                "duration_s": round(duration_s, 4),
                "error": running.error.message if running.error else "",
            },
        )

    def _measure(self, running: RunningRequest, outcome: str, duration_s: float) -> None:
        metrics, name = self.metrics, running.deployment
        metrics.requests.labels(name, outcome).inc()
        metrics.duration_s.labels(name).observe(duration_s)
        if running.first_text_s is not None:
            metrics.first_token_s.labels(name).observe(running.first_text_s - running.started_s)
        for end in running.ends.values():
            metrics.tokens.labels(name, "prompt").inc(end.usage.total_prompt_tokens)
            metrics.tokens.labels(name, "completion").inc(end.usage.total_completion_tokens)
            for report in end.stages:
                counter = metrics.stage_answers if report.is_accepted else metrics.escalations
                counter.labels(name, report.model).inc()
                if report.draft_tokens:
                    right = report.accepted_draft_tokens
                    wrong = report.draft_tokens - right
                    metrics.draft_tokens.labels(name, report.model, "accepted").inc(right)
                    metrics.draft_tokens.labels(name, report.model, "rejected").inc(wrong)
                if report.stopped_early:
                    metrics.early_stops.labels(name, report.model).inc()
                    metrics.spared_tokens.labels(name, report.model).inc(report.spared_tokens)
        for model in running.replaced:
            metrics.drafts_replaced.labels(name, model).inc()

    async def _follow_replicas(self) -> None:
        async for kinds in self._cluster.changes():
            if "replicas" not in kinds:
                continue
            self.prospects.replicas_changed()
            for model in self._starts.observe(self._cluster.view.replicas.values()):
                reason = self._starts.error_of(model) or "unknown"
                self._jobs.fail_waiting(model, cannot_start(model, reason))

    async def _guard_entries(self) -> None:
        """Look whether a restarted queue server lost entries: nothing tells of that."""
        while True:
            await asyncio.sleep(self._limits.entry_check_s)
            try:
                lost = await self._jobs.check_entries(min_age_s=self._limits.entry_check_s)
            except GearfallError as error:
                _log.warning("can't check the queue", extra={"error": error.message})
                continue
            if lost:
                self.metrics.entries_restored.inc(lost)


def _outcome(running: RunningRequest) -> str:
    if running.error is not None:
        return type(running.error).__name__
    if running.is_cancelled or len(running.ends) < running.choices:
        return "cancelled"
    return "finished"
