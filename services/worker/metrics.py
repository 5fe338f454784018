"""The worker's Prometheus metrics, in a registry of its own."""

from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.core.start_timeline import StartTimeline
from services.worker.engine_link.messages import StepDone
from services.worker.migration.call import Moved

_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_ERROR_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5)
_START_SECONDS = (0.001, 0.0025, 0.01, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)


class WorkerMetrics:
    """Counters and histograms of one worker's replicas, each under its model's name."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._hosted: Callable[[], Sequence[ReplicaRecord]] = lambda: ()
        self._last_steps: dict[ModelName, StepDone] = {}
        self._own_of_model: dict[ModelName, tuple[Histogram, Counter]] = {}
        """Steps and tokens of each model: finding them by label takes longer than counting."""
        self._replicas = Gauge(
            "gearfall_worker_replicas", "Replicas by state", ["state"], registry=registry
        )
        self._jobs = Gauge(
            "gearfall_worker_jobs",
            "Jobs the worker has claimed, and those of them that wait for a place in the batch",
            ["model", "state"],
            registry=registry,
        )
        self._kv_blocks = Gauge(
            "gearfall_worker_kv_blocks",
            "Blocks of the KV cache: all, and those that jobs have",
            ["model", "state"],
            registry=registry,
        )
        self._slowdown = Gauge(
            "gearfall_worker_engine_slowdown",
            "How much longer the engine's steps take lately than they did at their best",
            ["model"],
            registry=registry,
        )
        self._steps = Histogram(
            "gearfall_worker_step_seconds",
            "Decode and prefill steps, as the engine timed them",
            ["model"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "gearfall_worker_tokens", "Generated tokens", ["model"], registry=registry
        )
        self._ended = Counter(
            "gearfall_worker_jobs_ended",
            "Jobs that the engine ended",
            ["model", "finish"],
            registry=registry,
        )
        self._lost = Counter(
            "gearfall_worker_jobs_lost",
            "Jobs handed back to their routers unfinished",
            ["model", "reason"],
            registry=registry,
        )
        self._starts = Counter(
            "gearfall_worker_starts",
            "Starts of engines that succeeded or failed, and engines that died after theirs",
            ["model", "outcome"],
            registry=registry,
        )
        self._start_s = Histogram(
            "gearfall_worker_start_seconds",
            "Successful starts by phase; total is the whole",
            ["model", "phase"],
            buckets=_START_SECONDS,
            registry=registry,
        )
        self._migrations = Counter(
            "gearfall_worker_migrations",
            "Running jobs that were to leave this worker, by data path where they did",
            ["model", "outcome", "path"],
            registry=registry,
        )
        self._pauses = Histogram(
            "gearfall_worker_migration_pause_seconds",
            "From the last token here to the first one there",
            ["model", "path"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._moves = Histogram(
            "gearfall_worker_migration_seconds",
            "From the offer to the first token there",
            ["model", "path"],
            buckets=_START_SECONDS,
            registry=registry,
        )

        self._predicted = Histogram(
            "gearfall_worker_migration_predicted_seconds",
            "What the cost model had expected of them, where it knew anything",
            ["model", "path"],
            buckets=_START_SECONDS,
            registry=registry,
        )
        self._prediction_errors = Histogram(
            "gearfall_worker_migration_prediction_error_ratio",
            "|predicted - real| / real",
            ["model", "path"],
            buckets=_ERROR_RATIOS,
            registry=registry,
        )

    def follow(self, hosted: Callable[[], Sequence[ReplicaRecord]]) -> None:
        """Ask `hosted` for the worker's replicas at every scrape."""
        self._hosted = hosted

    def count_step(self, model: ModelName, step: StepDone) -> None:
        """Take one step of a model's engine in."""
        self._last_steps[model] = step
        own = self._own_of_model.get(model)
        if own is None:
            own = self._own_of_model[model] = self._steps.labels(model), self._tokens.labels(model)
        steps, counted_tokens = own
        for step_s in (*step.earlier_step_s, step.step_s):
            if step_s > 0:
                steps.observe(step_s)
        tokens = sum(len(run.token_ids) for run in step.runs)
        if tokens:
            counted_tokens.inc(tokens)
        for run in step.runs:
            if run.finish is not None:
                self._ended.labels(model, run.finish.value).inc()

    def count_start(self, model: ModelName, timeline: StartTimeline) -> None:
        """Take a start in that ended with a ready replica."""
        self._starts.labels(model, "ready").inc()
        for phase, seconds in (*timeline.phases(), ("total", timeline.total_s)):
            self._start_s.labels(model, phase).observe(seconds)

    def count_failure(self, model: ModelName, *, was_ready: bool) -> None:
        """Take the end of an engine in that nobody had asked for."""
        self._starts.labels(model, "died" if was_ready else "failed").inc()

    def count_lost(self, model: ModelName, reason: str) -> None:
        """Take a job in that was handed back: `engine` is gone, or `drain`."""
        self._lost.labels(model, reason).inc()

    def count_migration(self, model: ModelName, moved: Moved | None) -> None:
        """Take a migration from here in; without a `Moved` the job stayed."""
        if moved is None:
            self._migrations.labels(model, "stayed", "").inc()
            return
        path = moved.path.value
        self._migrations.labels(model, "moved", path).inc()
        if moved.duration_s > 0:  # else its end was not heard of
            self._pauses.labels(model, path).observe(moved.pause_s)
            self._moves.labels(model, path).observe(moved.duration_s)
            self._note_prediction(model, path, moved)

    def _note_prediction(self, model: ModelName, path: str, moved: Moved) -> None:
        if moved.predicted_s <= 0:
            return
        error = abs(moved.predicted_s - moved.duration_s) / moved.duration_s
        self._predicted.labels(model, path).observe(moved.predicted_s)
        self._prediction_errors.labels(model, path).observe(error)

    def render(self) -> bytes:
        """Return the exposition text."""
        hosted = self._hosted()
        for state in ReplicaState:
            self._replicas.labels(state.value).set(sum(each.state is state for each in hosted))
        self._jobs.clear()
        self._kv_blocks.clear()
        self._slowdown.clear()
        for replica in hosted:
            for outcome in ("failed", "died"):  # an alert on an increase wants a 0 before the 1
                self._starts.labels(replica.model, outcome)
            self._jobs.labels(replica.model, "claimed").set(replica.running_jobs)
            step = self._last_steps.get(replica.model)
            # No step comes after the last job's end: what the one before it said is over.
            is_idle = replica.running_jobs == 0
            self._jobs.labels(replica.model, "waiting").set(
                0 if step is None or is_idle else step.waiting_jobs
            )
            if step is not None:
                self._kv_blocks.labels(replica.model, "capacity").set(step.kv_blocks)
                used = 0 if is_idle else step.kv_used_blocks
                self._kv_blocks.labels(replica.model, "used").set(used)
                if step.slowdown > 0:
                    self._slowdown.labels(replica.model).set(step.slowdown)
        return generate_latest(self._registry)
