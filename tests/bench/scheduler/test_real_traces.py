"""What real clusters are asked: the seed's, in the paper's proportions."""

import argparse
from statistics import mean

import pytest

from bench.scheduler.real_cluster import Shape
from bench.scheduler.real_traces import TRACES, add_trace_flags, requests_of, trace_of


def asked(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_trace_flags(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize("name", TRACES)
def test_every_policy_gets_the_same_requests(name):
    trace = trace_of(name, asked("--rate", "2", "--duration", "20"))
    requests = requests_of(trace, trace.shape.names, 100.0, 1)
    assert requests == requests_of(trace, trace.shape.names, 100.0, 1)
    assert requests != requests_of(trace, trace.shape.names, 100.0, 2)
    assert len(requests) == 40
    assert {each.stages[0].model for each in requests} <= set(trace.shape.names)


@pytest.mark.parametrize("name", ["skewed", "even"])
def test_answers_are_as_long_as_in_the_paper(name):
    trace = trace_of(name, asked("--duration", "10000"))
    steps = 200.0
    loads = [
        each.stages[0].output_tokens / steps
        for each in requests_of(trace, trace.shape.names, steps, 3)
    ]
    assert mean(loads) == pytest.approx((1.15 + 3.24) / 2, rel=0.08), "the longest are cut"
    assert max(loads) <= 8.0
    assert sum(each < 1.5 for each in loads) / len(loads) == pytest.approx(0.5, abs=0.1)


def test_chats_are_as_long_as_in_the_paper_and_as_often_as_at_a_rate_of_0_3():
    trace = trace_of("chat", asked("--duration", "10000"))
    requests = requests_of(trace, trace.shape.names, 200.0, 3)
    loads = [each.stages[0].output_tokens / 200.0 for each in requests]
    assert mean(loads) == pytest.approx(338 * 0.0255 / 2.66, rel=0.08), "the longest are cut"
    places = trace.shape.nodes * trace.shape.places
    assert trace.per_s * trace.shape.load_s / places == pytest.approx(0.3 * 2.66 / 16, rel=0.01)
    assert trace.shape.dram_models / trace.shape.models == 0.5
    assert trace.shape.models / places == 32 / 16


@pytest.mark.parametrize("name", ["skewed", "even"])
def test_bursts_bring_as_many_requests_for_each_place_as_in_the_paper(name):
    trace = TRACES[name]
    places = trace.shape.nodes * trace.shape.places
    assert trace.cv**2 / places == pytest.approx(8.0**2 / 16)
    assert trace.shape.models / places == 32 / 16


def test_memory_and_rate_are_the_papers():
    even, skewed = TRACES["even"].shape, TRACES["skewed"].shape
    assert even.nodes * even.dram_models == even.models, "one copy of each"
    assert skewed.dram_models / skewed.models == pytest.approx(19 / 32, abs=0.5 / skewed.models)
    places = skewed.nodes * skewed.places
    there = 0.4 * 2.66 / 16
    assert TRACES["skewed"].per_s * skewed.load_s / places == pytest.approx(there, rel=0.01)


@pytest.mark.parametrize("dram_models", [2, 4, 7, 12])
def test_each_node_holds_its_own_part_first_and_as_much_as_fits(dram_models):
    shape = Shape(nodes=3, models=12, dram_models=dram_models)
    for node in range(shape.nodes):
        held = shape.filled(node)
        assert len(set(held)) == len(held) == dram_models
        assert held[:4] == shape.names[node::3][:dram_models]
    assert shape.pool_bytes >= dram_models * shape.file_bytes


def test_some_models_are_asked_for_more_often():
    trace = trace_of("skewed", asked("--duration", "10000"))
    models = [each.stages[0].model for each in requests_of(trace, trace.shape.names, 100.0, 1)]
    shares = [models.count(name) / len(models) for name in trace.shape.names]
    assert shares[0] == pytest.approx(0.32, abs=0.03)
    assert shares[0] == max(shares)
    assert shares[3] == pytest.approx(shares[0] / 4, abs=0.03)
