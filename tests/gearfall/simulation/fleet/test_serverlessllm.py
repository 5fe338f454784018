"""ServerlessLLM's setting as it is said to be, and a fleet of any size."""

from collections import Counter

import pytest

from gearfall.simulation.fleet.fleet_setting import COPIES, FleetShape, fleet_site
from gearfall.simulation.fleet.scenario import ORACLE, peak_replicas, policy_names, simulate
from gearfall.simulation.fleet.serverlessllm import (
    DEVICE_BYTES,
    DRAM_BYTES,
    SIZES,
    most_slots,
    serverlessllm,
)


@pytest.mark.parametrize(
    ("size", "models", "workers", "gigabytes", "slots"),
    [("6.7b", 32, 16, 13.3, 16), ("13b", 16, 16, 25.7, 8), ("30b", 8, 8, 59.9, 8)],
)
def test_sizes_of_the_setting(size, models, workers, gigabytes, slots):
    scenario = serverlessllm(size, duration_s=100.0)
    site = scenario.site
    assert (len(site.models), len(site.workers), len(site.nodes)) == (models, workers, 4)
    assert sum(worker.accelerators for worker in site.workers) == 16
    record = site.models[0].record
    assert record.size_bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert most_slots(record, DEVICE_BYTES * SIZES[size].accelerators) == slots
    assert len(scenario.requests) == 80


def test_memory_is_filled_with_another_part_on_each_node_first():
    nodes = serverlessllm(duration_s=60.0).site.nodes
    copies = Counter(name for node in nodes for name in node.in_dram)
    assert len(copies) == 32
    assert set(copies.values()) == {2, 3}
    size = serverlessllm(duration_s=60.0).site.models[0].record.size_bytes
    assert all(len(node.in_dram) == DRAM_BYTES // size for node in nodes)
    assert not any(node.in_dram for node in serverlessllm(is_filled=False).site.nodes)


@pytest.mark.parametrize(("size", "on_each"), [("6.7b", 8), ("13b", 4), ("30b", 2)])
def test_with_memory_for_one_copy_each_model_is_in_one_nodes_memory(size, on_each):
    nodes = serverlessllm(size, duration_s=60.0, dram_copies=1).site.nodes
    assert Counter(len(node.in_dram) for node in nodes) == {on_each: 4}
    held = Counter(name for node in nodes for name in node.in_dram)
    assert set(held.values()) == {1}
    assert all(node.dram_bytes < DRAM_BYTES / 2 for node in nodes)


def test_with_one_copy_each_model_is_on_one_disk_and_the_others_fetch_it():
    scenario = serverlessllm(ssd_copies=1, per_s=0.5, duration_s=60.0, seed=4, slots=0)
    held = Counter(name for node in scenario.site.nodes for name in node.on_ssd)
    assert set(held.values()) == {1}
    assert all(set(node.in_dram) <= set(node.on_ssd) for node in scenario.site.nodes)
    assert simulate(scenario, "random").tally.remote_bytes > 0


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_answers_all_in_the_setting(policy):
    scenario = serverlessllm(per_s=0.5, duration_s=120.0, seed=5)
    run = simulate(scenario, policy)
    assert (run.tally.arrived, run.tally.finished) == (60, 60)
    assert run.tally.waiting == run.tally.running == 0


def test_locality_pays_at_the_tail_and_preemption_kills_nobody():
    scenario = serverlessllm(per_s=0.4, duration_s=300.0, seed=6, slots=0)
    ours, random = simulate(scenario, "ours"), simulate(scenario, "random")
    assert ours.tally.ssd_bytes < random.tally.ssd_bytes
    preempt = simulate(scenario, "preempt")
    assert preempt.tally.finished == preempt.tally.arrived


def test_the_oracle_has_as_many_replicas_as_run_at_once():
    scenario = serverlessllm(per_s=0.5, duration_s=120.0, seed=5)
    models = {each.record.name: each for each in scenario.site.models}
    workers = dict.fromkeys(models, scenario.site.workers[0])
    peaks = peak_replicas(scenario.requests, models, workers)
    run = simulate(scenario, ORACLE)
    assert max(each.startup_s for each in run.outcomes) == 0.0
    assert run.tally.accelerator_s == pytest.approx(sum(peaks.values()) * run.tally.ended_s)


def test_a_fleet_has_three_copies_of_each_model_on_different_nodes():
    site = fleet_site(FleetShape(nodes=12, models=50))
    held = Counter(name for node in site.nodes for name in node.on_ssd)
    assert set(held.values()) == {COPIES}
    assert len(site.workers) == 48
