"""What real clusters are asked: the seed's, in the paper's proportions."""

import argparse
from statistics import mean

import pytest

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


def test_answers_are_as_long_as_in_the_paper():
    trace = trace_of("paper", asked("--duration", "10000"))
    steps = 200.0
    loads = [
        each.stages[0].output_tokens / steps
        for each in requests_of(trace, trace.shape.names, steps, 3)
    ]
    assert mean(loads) == pytest.approx((1.15 + 3.24) / 2, rel=0.05)
    assert max(loads) <= 8.0
    assert sum(each < 1.5 for each in loads) / len(loads) == pytest.approx(0.5, abs=0.1)


def test_bursts_bring_as_many_requests_for_each_place_as_in_the_paper():
    trace = TRACES["paper"]
    places = trace.shape.nodes * trace.shape.places
    assert trace.cv**2 / places == pytest.approx(8.0**2 / 16)
    assert trace.shape.models / places == 32 / 16
    assert trace.shape.nodes * trace.shape.dram_models == trace.shape.models, "one copy of each"
