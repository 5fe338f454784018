"""What a scheduler counts, seen as Prometheus sees it."""

import contextlib
import math
from collections.abc import AsyncIterator

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState
from gearfall.scheduling.estimates.start_costs import StartCosts, StartOutcome
from services.scheduler.metrics import SchedulerFigures, SchedulerMetrics
from tests.gearfall.infra.metric_samples import samples_of
from tests.gearfall.scheduling.clusters import WORKER, demand, replica
from tests.services.scheduler.loop_fleet import Fleet

SMALL = ModelName("small")
NOTHING = SchedulerFigures(False, 0, 0, 0, {}, StartCosts())
LEARNED = StartCosts(outcomes=(StartOutcome(SMALL, WORKER, 3.0, 4.0),))
BUSY = SchedulerFigures(True, 42, 3, 1, {SMALL: 7}, LEARNED)


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("gearfall_scheduler_leader",), 1),
        (("gearfall_scheduler_fence_revision",), 42),
        (("gearfall_scheduler_workers", "reachable"), 3),
        (("gearfall_scheduler_workers", "unreachable"), 1),
        (("gearfall_scheduler_waiting_jobs", "small"), 7),
        (("gearfall_scheduler_start_prediction_error", "ssd", "0.5"), 0.25),
        (("gearfall_scheduler_start_error_bucket", "ssd", "0.25"), 0),
        (("gearfall_scheduler_start_error_bucket", "ssd", "0.5"), 1),
        (("gearfall_scheduler_decisions_total", "start"), 1),
        (("gearfall_scheduler_decisions_total", "wait"), 0),
        (("gearfall_scheduler_placement_seconds_bucket", "0.001"), 1),
        (("gearfall_scheduler_start_seconds_sum", "small"), 4),
        (("gearfall_scheduler_start_predicted_to_real_bucket", "0.25"), 0),
        (("gearfall_scheduler_start_predicted_to_real_bucket", "0.5"), 1),
    ],
)
def test_what_is_counted_is_rendered(sample, value):
    metrics = SchedulerMetrics()
    metrics.count_decision("start")
    metrics.observe_placement(0.0007)
    metrics.observe_start(StartOutcome(SMALL, WORKER, predicted_s=2.0, measured_s=4.0))
    assert samples_of(metrics.render(BUSY))[sample] == value


def test_a_model_nobody_waits_for_any_more_is_gone():
    metrics = SchedulerMetrics()
    metrics.render(BUSY)
    seen = samples_of(metrics.render(NOTHING))
    assert not any(key[0] == "gearfall_scheduler_waiting_jobs" for key in seen)
    assert math.isnan(seen["gearfall_scheduler_start_prediction_error", "ssd", "0.95"])


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        yield await Fleet(stack).open()


async def test_a_leader_counts_what_it_decided_and_what_came_of_it(fleet: Fleet):
    loop = await fleet.scheduler()
    await fleet.cluster.put_demand(demand(), lease=fleet.lease)
    await fleet.until(lambda view: (WORKER, SMALL) in view.assignments)
    await fleet.cluster.put_replica(
        replica(state=ReplicaState.READY, total_s=2.0), lease=fleet.lease
    )
    # A decision that is written later has learned from what was there before.
    await fleet.cluster.put_demand(demand("large"), lease=fleet.lease)
    await fleet.until(lambda view: "large" in view.decisions)
    seen = samples_of(loop.render_metrics())
    assert seen["gearfall_scheduler_leader",] == 1
    assert seen["gearfall_scheduler_fence_revision",] > 0
    assert seen["gearfall_scheduler_workers", "reachable"] == 1
    assert seen["gearfall_scheduler_decisions_total", "start"] == 2
    assert seen["gearfall_scheduler_placement_seconds_count",] >= 2
    assert seen["gearfall_scheduler_start_seconds_count", "small"] == 1
    assert seen["gearfall_scheduler_start_predicted_to_real_count",] == 1
    assert 0 < seen["gearfall_scheduler_start_prediction_error", "ssd", "0.5"] < 1
