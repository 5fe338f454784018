"""What a worker counts, seen as Prometheus sees it."""

import pytest

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import Epoch, JobId, ModelName, NodeId, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.core.start_timeline import StartTimeline
from services.worker.engine_link.messages import StepDone
from services.worker.metrics import WorkerMetrics
from services.worker.migration.call import Moved
from services.worker.migration.cost import DataPath
from tests.gearfall.infra.metric_samples import samples_of

M = ModelName("m")


def replica(state=ReplicaState.READY, running_jobs=2) -> ReplicaRecord:
    return ReplicaRecord(WorkerId("w"), NodeId("n"), M, state, 16, running_jobs, 1, 0, 0.0)


def step(*, tokens=3, finish=None, step_s=0.02, waiting_jobs=1, earlier=()) -> StepDone:
    run = TokenRun(JobId("j"), Epoch(1), 0, tuple(range(tokens)), finish=finish)
    return StepDone(
        *((run,), 2, waiting_jobs, step_s),
        kv_blocks=64,
        kv_used_blocks=9,
        earlier_step_s=earlier,
        slowdown=1.25,
    )


def test_steps_that_are_told_together_are_counted_one_by_one() -> None:
    metrics = WorkerMetrics()
    metrics.count_step(M, step(step_s=0.3, earlier=(0.02, 0.02)))
    found = samples_of(metrics.render().decode())
    assert found["gearfall_worker_step_seconds_count", "m"] == 3
    assert found["gearfall_worker_step_seconds_bucket", "0.025", "m"] == 2


def moved(path: DataPath, **facts: float) -> Moved:
    times = {"pause_s": 0.03, "duration_s": 0.4, "predicted_s": 0.0} | facts
    return Moved(
        JobId("j"), Epoch(2), WorkerId("v"), path, rounds=1, moved_bytes=0, tokens=9, **times
    )


def counted(hosted) -> WorkerMetrics:
    metrics = WorkerMetrics()
    metrics.follow(lambda: hosted)
    metrics.count_step(M, step())
    metrics.count_step(M, step(tokens=1, finish=FinishReason.STOP, step_s=0.3))
    metrics.count_start(M, StartTimeline(ssd_s=0.4, build_s=0.1, total_s=0.6))
    metrics.count_failure(M, was_ready=False)
    metrics.count_failure(M, was_ready=True)
    metrics.count_lost(M, "engine")
    metrics.count_migration(M, moved(DataPath.KV))
    metrics.count_migration(M, moved(DataPath.KV, pause_s=0.0, duration_s=0.0, predicted_s=0.2))
    metrics.count_migration(M, moved(DataPath.TOKENS, predicted_s=0.5))
    metrics.count_migration(M, None)
    return metrics


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("gearfall_worker_replicas", "ready"), 1),
        (("gearfall_worker_replicas", "failed"), 0),
        (("gearfall_worker_jobs", "m", "claimed"), 2),
        (("gearfall_worker_jobs", "m", "waiting"), 1),
        (("gearfall_worker_kv_blocks", "m", "capacity"), 64),
        (("gearfall_worker_kv_blocks", "m", "used"), 9),
        (("gearfall_worker_engine_slowdown", "m"), 1.25),
        (("gearfall_worker_step_seconds_count", "m"), 2),
        (("gearfall_worker_step_seconds_bucket", "0.025", "m"), 1),
        (("gearfall_worker_tokens_total", "m"), 4),
        (("gearfall_worker_jobs_ended_total", "stop", "m"), 1),
        (("gearfall_worker_starts_total", "m", "ready"), 1),
        (("gearfall_worker_starts_total", "m", "failed"), 1),
        (("gearfall_worker_starts_total", "m", "died"), 1),
        (("gearfall_worker_start_seconds_sum", "m", "ssd"), 0.4),
        (("gearfall_worker_start_seconds_sum", "m", "total"), 0.6),
        (("gearfall_worker_jobs_lost_total", "m", "engine"), 1),
        (("gearfall_worker_migrations_total", "m", "moved", "kv"), 2),
        (("gearfall_worker_migrations_total", "m", "moved", "tokens"), 1),
        (("gearfall_worker_migrations_total", "m", "stayed", ""), 1),
        (("gearfall_worker_migration_pause_seconds_sum", "m", "kv"), 0.03),
        (("gearfall_worker_migration_pause_seconds_count", "m", "kv"), 1),
        (("gearfall_worker_migration_seconds_sum", "m", "tokens"), 0.4),
        (("gearfall_worker_migration_seconds_count", "m", "kv"), 1),
        (("gearfall_worker_migration_predicted_seconds_sum", "m", "tokens"), 0.5),
        (("gearfall_worker_migration_prediction_error_ratio_sum", "m", "tokens"), 0.25),
    ],
)
def test_what_is_counted_is_rendered(sample, value):
    assert samples_of(counted([replica()]).render())[sample] == pytest.approx(value)


def test_a_replica_shows_that_nothing_failed_yet():
    metrics = WorkerMetrics()
    metrics.follow(lambda: [replica(ReplicaState.LOADING)])
    seen = samples_of(metrics.render())
    starts = {key[2]: n for key, n in seen.items() if key[0] == "gearfall_worker_starts_total"}
    assert starts == {"failed": 0, "died": 0}, "an increase from nothing is none"


def test_a_move_without_a_prediction_or_an_end_counts_no_error():
    seen = samples_of(counted([]).render())
    name = "gearfall_worker_migration_prediction_error_ratio_count"
    assert {key: n for key, n in seen.items() if key[0] == name} == {(name, "m", "tokens"): 1}


def test_what_the_last_step_said_is_over_when_nothing_runs():
    seen = samples_of(counted([replica(running_jobs=0)]).render())
    assert seen["gearfall_worker_kv_blocks", "m", "used"] == 0
    assert seen["gearfall_worker_jobs", "m", "waiting"] == 0
    assert seen["gearfall_worker_kv_blocks", "m", "capacity"] == 64


def test_a_model_that_left_the_worker_has_no_gauges_but_keeps_its_counts():
    seen = samples_of(counted([]).render())
    assert not any(key[0] == "gearfall_worker_jobs" for key in seen)
    assert seen["gearfall_worker_tokens_total", "m"] == 4
    assert all(seen["gearfall_worker_replicas", state.value] == 0 for state in ReplicaState)
