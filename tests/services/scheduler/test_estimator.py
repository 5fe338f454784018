import pytest

from gearfall.core.records import StartTimeline, Tier
from services.scheduler.estimator import (
    KEPT_OUTCOMES,
    UNKNOWN_FIXED_S,
    StartCosts,
    learn_start,
    median_error,
    predict_start,
)
from tests.services.scheduler.clusters import WORKER, model, node


@pytest.mark.parametrize(
    ("resident", "ssd_bytes_per_s", "load_s", "tier"),
    [
        ((), 0.0, 0.5, Tier.SSD),
        ((), 5e8, 1.0, Tier.SSD),
        (("small",), 5e8, 0.0, Tier.DRAM),
    ],
)
def test_load_is_bytes_over_bandwidth_below_the_pool(resident, ssd_bytes_per_s, load_s, tier):
    record = model(size_bytes=500_000_000)
    found = predict_start(
        record, node(resident=resident, ssd_bytes_per_s=ssd_bytes_per_s), StartCosts()
    )
    assert found.load_s == pytest.approx(load_s)
    assert found.from_tier is tier
    assert found.total_s == pytest.approx(load_s + UNKNOWN_FIXED_S)


def test_fixed_cost_leaves_the_moving_of_bytes_out():
    timeline = StartTimeline(queued_s=0.1, ssd_s=2.0, build_s=0.4, total_s=2.5)
    costs = learn_start(StartCosts(), model().name, WORKER, timeline, predicted_s=2.0)
    assert predict_start(model(), node(resident=["small"]), costs).fixed_s == pytest.approx(0.5)
    other = model("other")
    assert predict_start(other, node(resident=["other"]), costs).fixed_s == pytest.approx(0.5)
    assert median_error(costs) == pytest.approx(0.2)


def test_newer_starts_move_the_average():
    costs = StartCosts()
    for total_s in (1.0, 2.0):
        costs = learn_start(costs, model().name, WORKER, StartTimeline(total_s=total_s), 1.0)
    assert costs.fixed_s == pytest.approx(1.3)


def test_outcomes_are_bounded():
    costs = StartCosts()
    for _ in range(KEPT_OUTCOMES + 5):
        costs = learn_start(costs, model().name, WORKER, StartTimeline(total_s=1.0), 1.0)
    assert len(costs.outcomes) == KEPT_OUTCOMES
    assert median_error(StartCosts()) is None
