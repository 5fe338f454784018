from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import NodeId
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.estimator import predict_start, queue_s
from gearfall.scheduling.estimates.start_costs import (
    UNKNOWN_FIXED_S,
    Start,
    StartCosts,
    learn_start,
)
from tests.gearfall.scheduling.clusters import NODE, WORKER, model, node

GB = 10**9


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
    found = predict_start(record, fast, Tier.SSD, StartCosts(), queued=((2 * GB, 0.0),))
    assert found.queued_s == pytest.approx(2.0)
    assert found.total_s == pytest.approx(2.5 + UNKNOWN_FIXED_S)
    assert found.terms() == (
        "3.50 s: behind 1 load 2.00 s, 0.50 GB from ssd at 1.00 GB/s (measured) 0.50 s, "
        "1.00 s to start"
    )


@pytest.mark.parametrize(
    ("tier", "queued", "left_s"),
    [
        (Tier.DRAM, (), 0.3),
        (Tier.SSD, (), 0.2),  # computed beside the load
        (Tier.SSD, ((GB // 10, 0.0),), 0.1),  # and beside the wait
        (Tier.SSD, ((GB, 0.0),), 0.0),
    ],
)
def test_a_new_models_canary_is_waited_for(tier, queued, left_s):
    record = model(size_bytes=GB // 10)
    fast = node(ssd_bytes_per_s=1e9)
    known = predict_start(record, fast, tier, StartCosts(), queued=queued)
    new = predict_start(
        record, replace(fast, preparing=(record.name,)), tier, StartCosts(), queued=queued
    )
    assert new.total_s - known.total_s == pytest.approx(left_s)
    assert ("canary" in new.terms()) == (left_s > 0)
    others = replace(fast, preparing=(model("of-another").name,))
    assert predict_start(record, others, tier, StartCosts(), queued=queued) == known


def loaded(costs: StartCosts, size_bytes: int, ssd_s: float, node_id: NodeId = NODE) -> StartCosts:
    timeline = StartTimeline(ssd_s=ssd_s, total_s=ssd_s + 0.1, from_tier=Tier.SSD)
    name = model(f"of-{size_bytes}").name
    return learn_start(costs, Start(name, size_bytes, node_id, WORKER, timeline, 0.0))


def test_a_nodes_own_loads_say_more_than_its_bandwidth():
    """Each load has a part that does not grow with its bytes: 0.2 s here, at 2 GB/s."""
    costs = StartCosts()
    for size in (GB // 10, GB, GB // 2, 2 * GB):
        costs = loaded(costs, size, 0.2 + size / 2e9)
    other_node = NodeId("other")
    published = {"ssd_bytes_per_s": 1e9}
    found = predict_start(model(size_bytes=GB), node(**published), Tier.SSD, costs)
    assert found.load_s == pytest.approx(0.7)
    assert found.fixed_s == pytest.approx(0.1)
    elsewhere = predict_start(model(size_bytes=GB), node(other_node, **published), Tier.SSD, costs)
    assert elsewhere.load_s == pytest.approx(1.0)


@given(st.lists(st.floats(5.0, 500.0), min_size=1, max_size=4))
def test_single_loads_that_met_a_busy_disk_move_nothing(outliers):
    costs = StartCosts()
    for size in (1, 2, 3, 4, 5, 6, 7, 8):
        costs = loaded(costs, size * GB // 8, 0.1 + size / 8)
    before = predict_start(model(size_bytes=GB), node(), Tier.SSD, costs)
    for slow_s in outliers[:1]:
        costs = loaded(costs, GB, slow_s)
    after = predict_start(model(size_bytes=GB), node(), Tier.SSD, costs)
    assert after.load_s == pytest.approx(before.load_s, rel=0.15)


def test_a_load_ahead_takes_as_long_as_loads_there_do():
    costs = StartCosts()
    for size in (GB // 10, GB, GB // 2, 2 * GB):
        costs = loaded(costs, size, 0.2 + size / 2e9)
    found = predict_start(
        model(size_bytes=GB), node(), Tier.SSD, costs, queued=((GB, 0.5), (GB, 0.4))
    )
    assert found.queued_s == pytest.approx(0.2 + 0.7)
    assert "behind 2 loads 0.90 s" in found.terms()


@pytest.mark.parametrize(
    ("loads", "left_s"),
    [
        ([], 0.0),
        ([(0.0, 2.0)], 2.0),
        ([(1.5, 2.0)], 0.5),
        ([(9.0, 2.0)], 0.1),  # late, but not done
        ([(1.0, 2.0), (1.0, 2.0)], 3.0),  # the second has not begun yet
        ([(0.5, 2.0), (1.0, 2.0)], 3.0),
        ([(9.0, 2.0), (1.0, 4.0)], 4.1),
        ([(-5.0, 2.0)], 2.0),  # a clock that went back
    ],
)
def test_loads_run_one_after_the_other(loads, left_s):
    assert queue_s(loads) == pytest.approx(left_s)


LOADS = st.lists(st.tuples(st.floats(0.0, 1e4), st.floats(0.0, 1e4)), max_size=5)


@given(LOADS, st.floats(0.0, 1e3))
def test_what_is_left_shrinks_with_time_and_is_never_nothing(loads, later_s):
    later = [(since_s + later_s, takes_s) for since_s, takes_s in loads]
    assert queue_s(later) <= queue_s(loads) + 1e-6
    assert queue_s(loads) >= max((takes_s / 20 for _, takes_s in loads), default=0.0) - 1e-9
    assert queue_s(loads) <= sum(takes_s for _, takes_s in loads) + 1e-6
