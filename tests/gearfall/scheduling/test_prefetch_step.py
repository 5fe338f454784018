"""Decisions fetch ahead: from what routers publish to a wish and back, at the step's own times."""

from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import DemandRecord, LoadRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.actions import Assign, Unwish, Wish
from gearfall.scheduling.estimates.start_costs import StartCosts
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy
from gearfall.scheduling.reconcile import decide
from gearfall.scheduling.scaling.autoscaler_limits import SchedulerPolicy
from gearfall.scheduling.snapshot import ClusterSnapshot
from tests.gearfall.scheduling.clusters import (
    NODE,
    by_name,
    by_node,
    by_worker,
    model,
    node,
    worker,
)

GB = 10**9
NAME = ModelName("small")
POLICY = SchedulerPolicy(prefetch=PrefetchPolicy(every_s=10.0))
NOW = 1_000_000.0


def fleet_of_one() -> Fleet:
    """A node with the model on its disk and a worker too small to host it: nothing starts."""
    here = node(on_ssd=("small",), ssd_bytes_per_s=2e9, dram_bytes=10 * GB)
    return Fleet.of(
        ClusterSnapshot(
            models=by_name(model(size_bytes=4 * GB)),
            nodes=by_node(here),
            workers=by_worker(worker(memory_bytes=GB)),
        )
    )


def load(arrived, at):
    return LoadRecord(NAME, RouterId("router-a"), at, arrived, 0, 0, 0)


def step(fleet, at, policy=POLICY):
    plan = decide(fleet, StartCosts(), policy, at)
    wishes = [each for each in plan.actions if isinstance(each, Wish | Unwish)]
    return wishes, plan.next_due_unix_s


def test_nothing_is_looked_at_before_anything_came():
    assert step(fleet_of_one(), NOW) == ([], None)


def test_what_came_is_wished_for_and_looked_at_again_in_time():
    fleet = fleet_of_one()
    fleet.put("load", load(0, NOW))
    assert step(fleet, NOW) == ([], NOW + 10.0)
    fleet.put("load", load(6, NOW + 3.0))
    assert step(fleet, NOW + 3.0) == ([], NOW + 10.0)
    (wish,), due = step(fleet, NOW + 10.0)
    assert isinstance(wish, Wish)
    assert (wish.prefetch.node_id, wish.prefetch.model) == (NODE, NAME)
    assert (wish.prefetch.tier, wish.prefetch.wished_unix_s) == (Tier.DRAM, NOW + 10.0)
    assert due == NOW + 20.0
    fleet.put("prefetch", wish.prefetch)
    assert step(fleet, NOW + 20.0)[0] == []


@pytest.mark.parametrize("waiting_jobs", [0, 1])
def test_what_is_hinted_at_is_wished_for_at_once_where_it_has_no_room_to_start(waiting_jobs):
    fleet = fleet_of_one()
    fleet.put("load", load(0, NOW))
    assert step(fleet, NOW) == ([], NOW + 10.0)
    hint = DemandRecord(NAME, RouterId("router-a"), waiting_jobs, NOW, hinted_jobs=1)
    fleet.put("demand", hint)
    plan = decide(fleet, StartCosts(), POLICY, NOW + 1.0)
    (wish,) = (each for each in plan.actions if isinstance(each, Wish))
    assert not any(isinstance(each, Assign) for each in plan.actions)
    assert (wish.prefetch.model, wish.prefetch.tier) == (NAME, Tier.DRAM)
    fleet.put("prefetch", wish.prefetch)
    assert step(fleet, NOW + 2.0) == ([], NOW + 10.0), "once"
    fleet.check()


def test_a_hint_is_enough_where_nothing_ever_came_and_ends():
    fleet = fleet_of_one()
    hint = DemandRecord(NAME, RouterId("router-a"), 0, 0.0, hinted_jobs=1)
    fleet.put("demand", hint)
    (wish,), _ = step(fleet, NOW)
    assert isinstance(wish, Wish)
    fleet.put("prefetch", wish.prefetch)
    fleet.remove("demand", (NAME, RouterId("router-a")))
    fleet.check()
    _, due = step(fleet, NOW + 0.1)
    assert due is not None
    (unwish,), _ = step(fleet, due)
    assert unwish == Unwish((NODE, NAME), "0% likely to be wanted within 300 s")


def test_with_many_models_each_has_its_turn_within_the_pause():
    fleet = fleet_of_one()
    for number in range(300):
        record = replace(load(number, NOW), model=ModelName(f"m{number}"))
        fleet.put("models", model(record.model, size_bytes=4 * GB))
        fleet.put("load", record)
    _, due = step(fleet, NOW)
    assert due == pytest.approx(NOW + 10.0 * 64 / 300)
    seen = [len(fleet.prefetch_turns)]
    for _ in range(5):
        assert due is not None
        _, due = step(fleet, due)
        seen.append(len(fleet.prefetch_turns))
    assert seen == [236, 172, 108, 44, 0, 236]


def test_a_wish_that_is_fulfilled_is_taken_back():
    fleet = fleet_of_one()
    fleet.put("load", load(0, NOW))
    step(fleet, NOW)
    fleet.put("load", load(6, NOW + 9.0))
    (wish,), _ = step(fleet, NOW + 10.0)
    assert isinstance(wish, Wish)
    fleet.put("prefetch", wish.prefetch)
    here = replace(fleet.records.nodes[NODE], resident=(NAME,), dram_used_bytes=4 * GB)
    fleet.put("nodes", here)
    (unwish,), _ = step(fleet, NOW + 20.0)
    assert unwish == Unwish((NODE, NAME), "is there")
    fleet.remove("prefetch", unwish.key)
    assert step(fleet, NOW + 30.0)[0] == []


def test_without_a_policy_nothing_is_wished_and_wishes_end():
    fleet = fleet_of_one()
    fleet.put("load", load(0, NOW))
    step(fleet, NOW)
    fleet.put("load", load(6, NOW + 9.0))
    (wish,), _ = step(fleet, NOW + 10.0)
    assert isinstance(wish, Wish)
    none = SchedulerPolicy(prefetch=None)
    fleet.put("prefetch", wish.prefetch)
    (unwish,), _ = step(fleet, NOW + 20.0, none)
    assert isinstance(unwish, Unwish)
    fleet.remove("prefetch", unwish.key)
    assert step(fleet, NOW + 30.0, none)[0] == []
