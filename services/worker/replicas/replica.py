"""One model on this worker: loaded, leased, forked, fed with jobs, restarted, drained.

    LOADING --leased--> STARTING --engine ready--> READY
       ^                   | error                   | engine died
       |___ after a pause __FAILED <_________________|

Any of these goes to DRAINING when the assignment is taken back, and ends.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from gearfall.core.errors import DeadlineExceeded, GearfallError
from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.core.ids import ModelName
from gearfall.core.ports import JobQueue
from gearfall.core.records import AssignmentRecord, ModelRecord, ReplicaRecord, ReplicaState
from gearfall.core.start_timeline import StartTimeline
from services.worker.engine_link.messages import EngineReady, StopEngine
from services.worker.jobs.claim_loop import ClaimLoop
from services.worker.jobs.job_board import JobBoard
from services.worker.metrics import WorkerMetrics
from services.worker.migration.cost import UNKNOWN_COST, Line
from services.worker.migration.evacuation import Evacuation
from services.worker.ports import EngineProcess, LoadedModel
from services.worker.processes.adapter_engine import AdapterEngine, adapting
from services.worker.processes.adapter_source import StoreAdapters
from services.worker.processes.watchdog import watching
from services.worker.replicas.draining import Drain, DrainOutcome
from services.worker.replicas.publisher import ReplicaPublisher
from services.worker.replicas.replica_start import (
    EXIT_TIMEOUT_S,
    ReplicaSettings,
    StartPorts,
    check_runs_alone,
    fetching,
    leased,
    ready,
    spawned,
    within,
)
from services.worker.replicas.restarts import restart_delay_s
from services.worker.replicas.start_clock import StartClock
from services.worker.replicas.waiting_jobs import find_waiting
from services.worker.replicas.workload import JobNews, KvShare, RecentSteps, running_jobs

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaPorts:
    """What a replica works with."""

    start: StartPorts
    queue: JobQueue
    board: JobBoard
    publisher: ReplicaPublisher
    alive_workers: Callable[[], frozenset[str]]
    clock: Callable[[], float] = time.time
    """Seconds since the Unix epoch."""
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    evacuate: Callable[[ModelName], Evacuation] | None = None
    """Moves a model's jobs elsewhere when it drains; None where there is no elsewhere."""
    move_cost: Callable[[ModelName], Line] = lambda _model: UNKNOWN_COST
    """Seconds that moving one of a model's jobs takes, by its tokens."""
    claim_rule: Callable[[ModelName], ClaimRule] = lambda _model: ClaimRule()
    """How the gears in force want a model's jobs claimed."""


class Replica:
    """Owner of one model's engine process on this worker, for as long as it is assigned."""

    def __init__(
        self,
        assignment: AssignmentRecord,
        model: ModelRecord,
        settings: ReplicaSettings,
        ports: ReplicaPorts,
    ) -> None:
        self.model: ModelName = assignment.model
        self._assignment = assignment
        self._model_record = model
        self._settings = settings
        self._ports = ports
        self._engine: EngineProcess | None = None
        self._adapted: AdapterEngine | None = None
        self._has_produced = False
        self._task: asyncio.Task[None] | None = None
        self._steps = RecentSteps()
        self._kv = KvShare(self._monotonic)
        self._news = JobNews(self._publish, self._monotonic)
        self._claims = ClaimLoop(
            self.model,
            settings.worker_id,
            settings.slots,
            ports.queue,
            ports.board,
            alive=ports.alive_workers,
            block_s=settings.claim_block_s,
            rule=lambda: ports.claim_rule(self.model),
        )
        self.is_draining = False
        self._drain = Drain(
            self.model,
            ports.board,
            self._claims,
            evacuate=ports.evacuate,
            has_engine=lambda: self._engine is not None,
        )
        self.record = ReplicaRecord(
            worker_id=settings.worker_id,
            node_id=settings.node_id,
            model=self.model,
            state=ReplicaState.LOADING,
            slots=settings.slots,
            running_jobs=0,
            pid=0,
            memory_bytes=assignment.memory_bytes,
            idle_since_unix_s=0.0,
        )

    @property
    def running_jobs(self) -> int:
        """Jobs that run or are about to."""
        return self._ports.board.occupied_slots(self.model)

    @property
    def digest(self) -> str:
        """Of the checkpoint that is served."""
        return self._model_record.digest

    def find_obstacle(self) -> str:
        """Return why no more jobs are taken here; empty if they are."""
        if self.is_draining or self.record.state is not ReplicaState.READY:
            return f"{self.model} is {self.record.state.value} here"
        return "" if self.running_jobs < self._settings.slots else "all slots are taken"

    def start(self) -> None:
        """Begin in the background."""
        self._ports.board.watch(self.model, self._on_claims_changed)
        self._claims.start()
        self._task = asyncio.create_task(self._run(), name=f"replica-{self.model}")

    def request_reclaim(self) -> None:
        """Take over what dead workers had claimed of this model."""
        self._claims.request_reclaim()

    def note_adrift(self, *, is_adrift: bool) -> None:
        """Say whether the replica stands without an assignment that nobody took back."""
        self.record = replace(self.record, is_adrift=is_adrift)
        self._publish()

    def note_models(self, models: Mapping[ModelName, ModelRecord]) -> None:
        """Let adapters go that are no longer registered as what they were."""

        def is_registered(name: ModelName, digest: str) -> bool:
            record = models.get(name)
            return record is not None and record.digest == digest and not record.is_removing

        if self._adapted is not None:
            self._adapted.retire(is_registered)

    async def drain(self, deadline_s: float, *, yields: bool = False) -> DrainOutcome:
        """Have the jobs leave, see `Drain.run`, and end.

        The record is withdrawn when the engine is gone and its lease given back.
        """
        self.is_draining = True
        self._publish(state=ReplicaState.DRAINING)
        outcome = await self._drain.run(deadline_s, yields=yields)
        await self._stop_engine()
        self._ports.board.unwatch(self.model)
        self._news.stop()
        self._ports.publisher.withdraw(self.model)
        return outcome

    async def settle(self) -> None:
        """After `drain`: hand back what the queue gave this replica without its knowledge."""
        await self._claims.settle()

    async def _run(self) -> None:
        failures = 0
        assigned_unix_s = self._assignment.assigned_unix_s
        waited_s = max(0.0, self._ports.clock() - assigned_unix_s)
        while True:
            self._has_produced = False
            clock = StartClock(self._monotonic() - waited_s, assigned_unix_s)
            error = await self._attempt(clock)
            if self.is_draining:
                return
            waited_s = assigned_unix_s = 0.0
            failures = 1 if self._has_produced else failures + 1
            pause_s = restart_delay_s(failures)
            was_ready = self.record.state is ReplicaState.READY
            self._ports.metrics.count_failure(self.model, was_ready=was_ready)
            idle_since = self.record.idle_since_unix_s if failures > 1 else 0.0
            self._publish(
                state=ReplicaState.FAILED,
                pid=0,
                error=error,
                idle_since=idle_since or self._ports.clock(),
                failures=failures,
            )
            _log.error(
                "replica failed",
                extra={"model": self.model, "error": error, "restart_in_s": pause_s},
            )
            await asyncio.sleep(pause_s)

    async def _attempt(self, clock: StartClock) -> str:
        """Start and run one engine until it is gone; return why it is."""
        model, settings, ports = self._model_record, self._settings, self._ports.start
        try:
            check_runs_alone(self._assignment)
            self._publish(state=ReplicaState.LOADING)
            async with (
                fetching(model, ports.store) as fetch,
                leased(model, settings, ports, clock) as held,
            ):
                held.loading.add_done_callback(self._on_loaded)
                files, waiting = await asyncio.gather(
                    fetch, find_waiting(self._ports.queue, self.model, settings.slots)
                )
                async with spawned(
                    model, settings, ports, held, files, clock=clock, expected=waiting
                ) as engine:
                    found = await ready(engine, held)
                    await self._serve(engine, clock.finish(self._monotonic(), found), found)
        except GearfallError as error:
            return error.message
        except Exception as error:
            _log.exception("unexpected error in a replica", extra={"model": self.model})
            return f"internal error: {type(error).__name__}: {error}"
        return "the engine process died"

    async def _serve(
        self, engine: EngineProcess, timeline: StartTimeline, ready: EngineReady
    ) -> None:
        """Claim jobs and push tokens until the engine is gone."""
        start = self._ports.start
        source = StoreAdapters(start.store, start.take_lease, self._settings.worker_id)
        async with adapting(engine, source, self._publish) as adapted:
            self._adapted = adapted
            try:
                await self._serve_adapted(adapted, timeline, ready)
            finally:
                self._adapted = None

    async def _serve_adapted(
        self, engine: AdapterEngine, timeline: StartTimeline, ready: EngineReady
    ) -> None:
        self._engine = engine
        self._ports.board.attach_engine(self.model, engine)
        self._publish(
            state=ReplicaState.READY,
            pid=engine.pid,
            error="",
            failures=0,
            idle_since=self._ports.clock(),
            timeline=timeline,
        )
        _log.info(
            "replica ready",
            extra={
                "model": self.model,
                "pid": engine.pid,
                "total_s": timeline.total_s,
                "kv_bytes": ready.kv_bytes,
                "from_tier": timeline.from_tier.value,
                "phases_s": {name: round(spent, 6) for name, spent in timeline.phases()},
            },
        )
        self._ports.metrics.count_start(self.model, timeline)
        self._claims.open()
        try:
            async with watching(engine, lambda: self.running_jobs > 0) as watchdog:
                async for step in engine:
                    watchdog.heard()
                    self._has_produced = self._has_produced or bool(step.runs)
                    self._ports.metrics.count_step(self.model, step)
                    self._ports.board.push_step(step)
                    self._steps.note(step)
                    # The step that ended the last job came after idle was told.
                    if self.running_jobs > 0 and self._kv.note(step):
                        self._publish()
                    self._news.jobs_advanced()
        finally:
            self._claims.close()
            self._engine = None
            self._ports.board.detach_engine(self.model)

    async def _stop_engine(self) -> None:
        """Have the engine exit by itself if it does so soon; return when it is gone."""
        if self._engine is not None:
            self._engine.send(StopEngine())
            with contextlib.suppress(DeadlineExceeded):
                await within(EXIT_TIMEOUT_S, self._engine.wait_exit(), "the engine's exit")
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _on_loaded(self, loading: asyncio.Task[LoadedModel]) -> None:
        is_loaded = not loading.cancelled() and loading.exception() is None
        if is_loaded and self.record.state is ReplicaState.LOADING:
            self._publish(state=ReplicaState.STARTING)

    def note_moved(self) -> None:
        """A job of this replica was moved: what that costs may be known better now."""
        self._news.jobs_changed()

    def _on_claims_changed(self) -> None:
        self._drain.note_changed()
        self._claims.wake()
        was_idle, is_idle = self.record.idle_since_unix_s > 0.0, self.running_jobs == 0
        if self.record.state is ReplicaState.READY and is_idle != was_idle:
            # Told with the news: each short job begins and ends an idle time.
            idle_since_s = self._ports.clock() if is_idle else 0.0
            self.record = replace(
                self.record, idle_since_unix_s=idle_since_s, running_jobs=self.running_jobs
            )
        self._news.jobs_changed()

    def _publish(
        self,
        *,
        state: ReplicaState | None = None,
        pid: int | None = None,
        error: str | None = None,
        idle_since: float | None = None,
        timeline: StartTimeline | None = None,
        failures: int | None = None,
    ) -> None:
        last, cost = self.record, self._ports.move_cost(self.model)
        if self.is_draining:
            state = ReplicaState.DRAINING
        self.record = replace(
            last,
            state=state or last.state,
            pid=last.pid if pid is None else pid,
            error=last.error if error is None else error,
            idle_since_unix_s=last.idle_since_unix_s if idle_since is None else idle_since,
            timeline=timeline or last.timeline,
            failures=last.failures if failures is None else failures,
            running_jobs=self.running_jobs,
            adapters=() if self._adapted is None else self._adapted.adapters,
            jobs=running_jobs(self._ports.board.running(self.model)),
            seen_unix_s=self._ports.clock(),
            step_s=self._steps.step_s,
            slowdown=self._steps.slowdown,
            kv_share=self._kv.tell(is_idle=self.running_jobs == 0),
            move_fixed_s=cost.fixed_s,
            move_s_per_token=cost.per_unit_s,
        )
        self._ports.publisher.publish(self.record)

    def _monotonic(self) -> float:
        return self._ports.start.monotonic()
