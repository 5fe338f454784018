"""What is learned from starts, and that it survives the way to the next leader."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.start_costs import (
    KEPT_OUTCOMES,
    NEWEST,
    UNKNOWN_CANARY,
    UNKNOWN_FIXED_S,
    Start,
    StartCosts,
    error_quantile,
    fixed_s,
    forget_absent,
    learn_start,
)
from gearfall.scheduling.estimates.start_costs_json import MAX_BYTES, costs_from_json, costs_to_json
from tests.gearfall.scheduling.clusters import NODE, WORKER

SMALL, OTHER = ModelName("small"), ModelName("other")
FAR = NodeId("far")


def start(
    total_s: float,
    *,
    model: ModelName = SMALL,
    size_bytes: int = 10**9,
    node_id: NodeId = NODE,
    tier: Tier = Tier.DRAM,
    predicted_s: float = 1.0,
    **phases: float,
) -> Start:
    timeline = StartTimeline(total_s=total_s, from_tier=tier, **phases)
    return Start(model, size_bytes, node_id, WORKER, timeline, predicted_s)


def learned(*starts: Start) -> StartCosts:
    costs = StartCosts()
    for each in starts:
        costs = learn_start(costs, each)
    return costs


def known_s(costs, model=SMALL, size_bytes=10**9, tier=Tier.DRAM, node_id=NODE) -> float:
    return fixed_s(costs, model, size_bytes, tier, node_id)


def test_moving_waiting_and_the_canary_that_is_recorded_once_are_left_out():
    costs = learned(
        start(
            3.75,
            tier=Tier.SSD,
            ssd_s=2.0,
            waited_s=1.0,
            prepare_s=0.25,
            queued_s=0.1,
            build_s=0.4,
        )
    )
    assert known_s(costs, tier=Tier.SSD) == pytest.approx(0.5)


def test_reading_a_canary_that_is_there_is_a_part_of_every_start():
    costs = learned(start(0.033, prepare_s=0.002))
    assert known_s(costs) == pytest.approx(0.033)
    assert costs.canary_line == UNKNOWN_CANARY


def test_the_canary_of_a_new_model_is_learned_from_the_assignment_on():
    first = start(
        1.4,
        tier=Tier.SSD,
        queued_s=0.1,
        waited_s=0.2,
        ssd_s=0.5,
        attach_s=0.05,
        prepare_s=0.3,
    )
    costs = learned(first)
    assert known_s(costs, tier=Tier.SSD) == pytest.approx(0.4)
    assert costs.canary_line.at(1) == pytest.approx(1.15)
    costs = learned(
        *(
            start(2.0, size_bytes=n * 10**9, model=ModelName(f"m{n}"), prepare_s=0.2 + 0.1 * n)
            for n in (1, 2, 3)
        )
    )
    assert costs.canary_line.at(10 * 10**9) == pytest.approx(1.2)


def test_the_copy_to_a_device_is_a_part_of_a_start_from_memory():
    assert known_s(learned(start(1.0, device_s=0.7))) == pytest.approx(1.0)
    costs = learned(start(3.0, tier=Tier.SSD, ssd_s=2.0, device_s=0.7))
    assert known_s(costs, tier=Tier.SSD) == pytest.approx(0.3)


def test_nothing_known():
    assert known_s(StartCosts()) == UNKNOWN_FIXED_S
    assert error_quantile(StartCosts(), 0.5) is None


def test_a_slow_start_among_others_moves_nothing():
    costs = learned(*(start(s) for s in (0.2, 0.2, 30.0, 0.21, 0.19)))
    assert known_s(costs) == pytest.approx(0.2)


def test_a_lasting_change_is_followed():
    costs = learned(*(start(s) for s in (0.2,) * 9 + (0.5,) * (NEWEST // 2 + 1)))
    assert known_s(costs) == pytest.approx(0.5)


def test_tiers_and_nodes_have_times_of_their_own():
    """From SSD the engine builds beside the load: what is left behind it is another time."""
    costs = learned(
        start(1.0),
        start(1.0),
        start(0.1, tier=Tier.SSD),
        start(4.0, node_id=FAR),
        start(4.0, node_id=FAR),
    )
    assert known_s(costs) == pytest.approx(1.0)
    assert known_s(costs, tier=Tier.SSD) == pytest.approx(0.1)
    assert known_s(costs, node_id=FAR) == pytest.approx(4.0)
    assert known_s(costs, node_id=NodeId("new")) == pytest.approx(2.5)


def test_a_model_never_started_is_guessed_by_its_size():
    sizes = (10**8, 5 * 10**8, 10**9)
    starts = (start(0.1 + n / 1e9, model=ModelName(f"m{n}"), size_bytes=n) for n in sizes)
    costs = learned(*starts)
    assert known_s(costs, OTHER, 2 * 10**9) == pytest.approx(2.1)
    assert known_s(costs, OTHER, 2 * 10**9, Tier.REMOTE) == pytest.approx(2.1)


def test_errors_are_counted_for_what_was_predicted():
    costs = learned(
        start(2.0, predicted_s=1.0), start(1.0, predicted_s=0.9), start(1.0, predicted_s=0.0)
    )
    assert error_quantile(costs, 0.5) == pytest.approx(0.3)
    assert error_quantile(costs, 1.0, Tier.DRAM) == pytest.approx(0.5)
    assert error_quantile(costs, 0.5, Tier.SSD) is None


def test_what_is_kept_is_bounded():
    costs = learned(*(start(1.0, tier=Tier.SSD, ssd_s=0.5) for _ in range(KEPT_OUTCOMES + 5)))
    assert len(costs.outcomes) == KEPT_OUTCOMES
    assert all(len(times) <= NEWEST for times in costs.fixed.values())


def test_models_and_nodes_that_are_gone_are_forgotten():
    costs = learned(start(1.0, tier=Tier.SSD, ssd_s=0.5), start(1.0, model=OTHER, node_id=FAR))
    kept = forget_absent(costs, {SMALL}, {FAR})
    assert {(m, n) for m, _, n in kept.fixed} == {(SMALL, "")}
    assert not kept.loads


_starts = st.builds(
    start,
    st.floats(0.0, 1e4),
    model=st.sampled_from([SMALL, OTHER]),
    size_bytes=st.integers(0, 10**12),
    node_id=st.sampled_from([NODE, FAR]),
    tier=st.sampled_from([Tier.REMOTE, Tier.SSD, Tier.DRAM]),
    predicted_s=st.floats(0.0, 1e4),
    ssd_s=st.floats(0.0, 1e4),
    prepare_s=st.floats(0.0, 1e3),
)


@given(st.lists(_starts, max_size=12))
def test_the_next_leader_reads_what_the_last_one_knew(starts):
    costs = learned(*starts)
    assert costs_from_json(costs_to_json(costs)) == costs


def test_thousands_of_models_fit_into_one_value():
    many = {
        (ModelName(f"model-{n:05d}-with-a-long-name"), Tier.SSD, node_id): (0.123456789,) * NEWEST
        for n in range(10_000)
        for node_id in (NODE, FAR)
    }
    text = costs_to_json(StartCosts(fixed=many))
    assert len(text) <= MAX_BYTES
    assert (ModelName("model-09999-with-a-long-name"), Tier.SSD, FAR) in costs_from_json(text).fixed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"fixed":[["m","ssd","n",[-1]]],"loads":[],"load_lines":[],"by_size":[],"outcomes":[]}',
        '{"fixed":[["m","ssd","n",[]]],"loads":[],"load_lines":[],"by_size":[],"outcomes":[]}',
        '{"fixed":[["m","tape","n",[1]]],"loads":[],"load_lines":[],"by_size":[],"outcomes":[]}',
        '{"fixed":[],"loads":[],"load_lines":[["n","ssd",1,1e99]],"by_size":[],"outcomes":[]}',
        '{"fixed":[],"loads":[["n","ssd",[[-5,1.0]]]],"load_lines":[],"by_size":[],"outcomes":[]}',
        '{"fixed":[],"loads":[],"load_lines":[],"by_size":[],"outcomes":[],"more":1}',
        "[" * 100_000,
    ],
)
def test_what_no_leader_wrote_is_refused(text):
    with pytest.raises(InvalidRequest, match="no start costs"):
        costs_from_json(text)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    with pytest.raises(InvalidRequest):
        costs_from_json(text)
