import pytest

from gearfall.core.records import StartTimeline, Tier
from gearfall.scheduling.estimator import (
    KEPT_OUTCOMES,
    UNKNOWN_FIXED_S,
    StartCosts,
    learn_start,
    median_error,
    predict_start,
)
from tests.gearfall.scheduling.clusters import WORKER, model, node


@pytest.mark.parametrize(
    ("tier", "measured", "load_s"),
    [
        (Tier.SSD, {}, 0.5),
        (Tier.SSD, {"ssd_bytes_per_s": 5e8}, 1.0),
        (Tier.SSD, {"remote_bytes_per_s": 1e7}, 0.5),
        (Tier.REMOTE, {"ssd_bytes_per_s": 5e8}, 2.0),
        (Tier.REMOTE, {"remote_bytes_per_s": 1e8}, 5.0),
        (Tier.DRAM, {"ssd_bytes_per_s": 5e8}, 0.0),
    ],
)
def test_load_is_bytes_over_the_bandwidth_of_the_tier_they_are_in(tier, measured, load_s):
    record = model(size_bytes=500_000_000)
    found = predict_start(record, node(**measured), tier, StartCosts())
    assert found.load_s == pytest.approx(load_s)
    assert found.from_tier is tier
    assert found.total_s == pytest.approx(load_s + UNKNOWN_FIXED_S)
    mentioned = "measured" if found.is_measured else "assumed" if load_s else "in dram"
    assert mentioned in found.terms()
    assert found.is_measured == (tier.value + "_bytes_per_s" in measured)


def test_loads_asked_for_before_come_first():
    fast = node(ssd_bytes_per_s=1e9)
    record = model(size_bytes=500_000_000)
    found = predict_start(record, fast, Tier.SSD, StartCosts(), queued_bytes=2_000_000_000)
    assert found.queued_s == pytest.approx(2.0)
    assert found.total_s == pytest.approx(2.5 + UNKNOWN_FIXED_S)
    assert found.terms() == (
        "3.50 s: behind 2.00 GB 2.00 s, 0.50 GB from ssd at 1.00 GB/s (measured) 0.50 s, "
        "1.00 s to start"
    )


def test_fixed_cost_leaves_the_moving_of_bytes_out():
    timeline = StartTimeline(queued_s=0.1, ssd_s=2.0, build_s=0.4, total_s=2.5)
    costs = learn_start(StartCosts(), model().name, WORKER, timeline, predicted_s=2.0)
    for record in (model(), model("other")):
        assert predict_start(record, node(), Tier.DRAM, costs).fixed_s == pytest.approx(0.5)
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
