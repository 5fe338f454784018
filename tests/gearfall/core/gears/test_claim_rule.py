from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.gears.claim_rule import MOST_WAIT_S, ClaimRule, claim_rule
from gearfall.core.gears.gear_plan import Gear, Promise
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState, Stage

SMALL = ModelName("small")
PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 0.2, (1.0,))
GEAR = Gear(50.0, (Stage(SMALL),), PROMISE, shares={"small": {"a": 0.75, "b": 0.25}})


def on(*places: str, state: ReplicaState = ReplicaState.READY) -> list[ReplicaRecord]:
    """One replica for each place, `node/number`."""
    return [
        ReplicaRecord(WorkerId(place), NodeId(place[0]), SMALL, state, 8, 0, 1, 0, 0.0)
        for place in places
    ]


def share(worker: str, replicas: list[ReplicaRecord], *gears: Gear) -> float | None:
    return claim_rule(SMALL, WorkerId(worker), gears or (GEAR,), replicas).share


@pytest.mark.parametrize(
    ("worker", "places", "expected"),
    [
        ("a/1", ("a/1", "b/1"), 0.75),
        ("b/1", ("a/1", "b/1"), 0.25),
        ("a/1", ("a/1", "a/2", "b/1"), 0.375),
        ("b/1", ("b/1",), 1.0),
        ("c/1", ("a/1", "c/1"), 0.0),
        ("c/1", ("c/1",), None),
        ("a/1", ("b/1",), None),
    ],
)
def test_a_workers_share_is_its_nodes_among_those_that_are_ready(worker, places, expected):
    assert share(worker, on(*places)) == expected


def test_a_replica_that_only_starts_gets_nothing_and_counts_for_nothing():
    replicas = on("a/1") + on("b/1", state=ReplicaState.STARTING)
    assert share("a/1", replicas) == 1.0
    assert share("b/1", replicas) is None


def test_a_gear_that_does_not_ask_the_model_asks_nothing_of_its_workers():
    other = replace(GEAR, stages=(Stage(ModelName("large")),), triggers={"small": 8})
    assert claim_rule(SMALL, WorkerId("a/1"), (other,), on("a/1", "b/1")) == ClaimRule()
    assert claim_rule(SMALL, WorkerId("a/1"), (), on("a/1")) == ClaimRule()


def test_of_several_plans_the_mean_share_and_the_lowest_trigger_count():
    other = replace(GEAR, shares={"small": {"a": 0.25, "b": 0.75}}, triggers={"small": 4})
    assert share("a/1", on("a/1", "b/1"), GEAR, other) == 0.5
    assert claim_rule(SMALL, WorkerId("a/1"), (GEAR, other), on("a/1")).trigger == 1


@pytest.mark.parametrize(
    ("p95_s", "expected_s"), [(0.2, 0.02), (60.0, MOST_WAIT_S), (0.0, MOST_WAIT_S)]
)
def test_a_trigger_holds_no_job_longer_than_a_tenth_of_the_promise(p95_s, expected_s):
    held = replace(GEAR, triggers={"small": 4}, promise=replace(PROMISE, p95_s=p95_s))
    rule = claim_rule(SMALL, WorkerId("a/1"), (held,), on("a/1"))
    assert rule.trigger == 4
    assert rule.most_wait_s == pytest.approx(expected_s)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.0, 1.0), min_size=1),
    st.sets(st.tuples(st.sampled_from("abcde"), st.integers(1, 3)), min_size=1),
)
def test_the_shares_of_all_who_are_ready_add_up(by_node, places):
    gear = replace(GEAR, shares={"small": by_node})
    replicas = on(*sorted(f"{node}/{number}" for node, number in places))
    shares = [share(str(each.worker_id), replicas, gear) for each in replicas]
    if sum(by_node.get(node, 0.0) for node in {node for node, _ in places}) > 0.0:
        known = [each for each in shares if each is not None]
        assert len(known) == len(shares)
        assert min(known) >= 0.0
        assert sum(known) == pytest.approx(1.0)
    else:
        assert set(shares) == {None}
