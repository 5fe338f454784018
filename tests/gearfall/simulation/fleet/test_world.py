"""A whole simulated fleet: nobody is lost, nothing overflows, same seed, same fleet."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from gearfall.scheduling.policies import PlacementPolicy, decide_step
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.arrivals import Bursts, Lengths, Load, bursty_requests
from gearfall.simulation.fleet.controller import FleetController
from gearfall.simulation.fleet.tally import Tally
from gearfall.simulation.fleet.world import World
from gearfall.simulation.requests import Request, StageWork
from gearfall.simulation.site import Emptying, Site
from tests.gearfall.simulation.sites import make_site, request

EMPTYING = {PlacementPolicy.OURS: Emptying.MOVE, PlacementPolicy.PREEMPT: Emptying.PREEMPT}


def simulate(
    site: Site,
    requests,
    policy: PlacementPolicy = PlacementPolicy.OURS,
    *,
    is_checked: bool = False,
) -> tuple[Tally, World]:
    site = replace(site, emptying=EMPTYING.get(policy, Emptying.FINISH))
    controller = FleetController(SchedulerPolicy(keep_alive_s=5.0), decide_step(policy, seed=1))
    world = World(site, requests, controller)
    if is_checked:
        step = world.agenda.step
        before = [world.agenda.now_s]

        def checked_step() -> bool:
            happened = step()
            assert world.agenda.now_s >= before[0]
            before[0] = world.agenda.now_s
            world.check()
            return happened

        world.agenda.step = checked_step  # type: ignore[method-assign]
    return world.run(), world


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(PlacementPolicy),
    models=st.integers(1, 6),
    nodes=st.integers(1, 3),
    slots=st.integers(1, 3),
    most=st.integers(1, 3),
    on_ssd=st.booleans(),
    bursts=st.sampled_from(Bursts),
)
def test_every_request_is_answered_and_nothing_overflows(
    seed, policy, models, nodes, slots, most, on_ssd, bursts
):
    site = make_site(models, nodes, slots=slots, most=most, on_ssd=on_ssd, dram_gb=40)
    requests = bursty_requests(
        seed,
        [each.record.name for each in site.models],
        Load(0.3, 60.0, 4.0, Lengths(50, 1.0, 500), Lengths(50, 1.0, 500), bursts=bursts),
    )[:80]
    tally, world = simulate(site, requests, policy, is_checked=True)
    assert (tally.finished, tally.waiting, tally.running) == (len(requests), 0, 0)
    assert sorted(each.number for each in world.outcomes) == [each.number for each in requests]
    assert tally.remote_bytes == 0 or not on_ssd


@pytest.mark.parametrize("policy", PlacementPolicy)
def test_the_same_seed_gives_the_same_fleet_to_the_last_bit(policy):
    site = make_site(models=6, most=2)
    names = [each.record.name for each in site.models]
    lengths = Lengths(60, 1.0, 500)

    def run(seed: int) -> tuple[Tally, list[object]]:
        requests = bursty_requests(seed, names, Load(0.5, 120.0, 8.0, lengths, lengths))
        tally, world = simulate(site, requests, policy)
        return tally, list(world.outcomes)

    assert run(7) == run(7)
    assert run(7) != run(8)


def test_a_cold_start_takes_what_its_parts_take():
    tally, world = simulate(make_site(), [request(0, 1.0, "m0")])
    outcome = world.outcomes[0]
    # Decided and followed after 5 ms each, 10 GB at 5 GB/s, 0.25 s to start; then the prompt.
    assert outcome.startup_s == pytest.approx(0.01 + 2.0 + 0.25)
    assert outcome.first_token_s == pytest.approx(outcome.startup_s + 10 * 0.001)
    assert outcome.total_s == pytest.approx(outcome.first_token_s + 19 * 0.02)
    assert (tally.ssd_bytes, tally.starts) == (10 * 10**9, 1)


def test_the_next_stage_runs_when_an_answer_is_not_certain():
    small, large = ModelName("m0"), ModelName("m1")
    up = Request(0, 0.0, (StageWork(small, 10, 5, goes_up=True), StageWork(large, 10, 5)))
    stays = Request(1, 0.0, (StageWork(small, 10, 5), StageWork(large, 10, 5)))
    tally, world = simulate(make_site(), [up, stays])
    assert [(o.number, o.stage, o.model) for o in world.outcomes] == [
        (0, 0, small),
        (1, 0, small),
        (0, 1, large),
    ]
    assert tally.finished == 3


def test_jobs_of_a_replica_that_leaves_move_alive():
    """Two workers serve m0; the one with most jobs is taken back, the other has two slots free."""
    site = make_site(models=1, nodes=2, workers_per_node=1, slots=3, most=2)
    requests = [request(number, 0.0, "m0", output=1500) for number in range(4)]
    world = World(site, requests, FleetController(SchedulerPolicy(keep_alive_s=5.0)))

    def take_back() -> None:
        ready = [replica for replica in world.workers.replicas.values() if replica.is_ready]
        assert sorted(len(replica.jobs) for replica in ready) == [1, 3]
        world.workers.take_back(max(ready, key=lambda replica: len(replica.jobs)).key)

    world.agenda.after(10.0, take_back)
    tally = world.run()
    assert tally.finished == 4
    assert sum(each.moves for each in world.outcomes) >= 2
    assert all(each.preemptions == 0 for each in world.outcomes)
    assert max(each.paused_s for each in world.outcomes) == pytest.approx(0.02)


def test_a_preempted_job_goes_on_from_its_tokens():
    site = make_site(models=2, nodes=1, workers_per_node=1, slots=1)
    requests = [request(0, 0.0, "m0", output=1000), request(1, 8.0, "m1")]
    _, world = simulate(site, requests, PlacementPolicy.PREEMPT)
    by_number = {each.number: each for each in world.outcomes}
    assert by_number[0].preemptions == 1
    assert by_number[1].preemptions == 0
    # It waited for the other's start and answer and for its own second start.
    assert by_number[0].waited_s > by_number[0].startup_s + 2.0
    # Nothing that was produced is produced again: steps for all tokens and prompts, and waiting.
    assert by_number[0].total_s == pytest.approx(
        by_number[0].waited_s + 999 * 0.02 + 0.01 + 0.29, abs=0.05
    )
