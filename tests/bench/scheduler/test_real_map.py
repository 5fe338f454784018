"""The map around the real cluster's traces: what a point of it is, and what is printed of it."""

import argparse
from statistics import mean

import pytest
from rich.console import Console

from bench.scheduler.real_map import Cell, add_map_flags, cells_of, ratios_of, tables_of
from bench.scheduler.real_traces import requests_of

FIGURES = {"ours": [1.0, 3.0], "random": [4.0, 3.0], "locality": [2.0, 4.0]}


@pytest.mark.parametrize(("answers", "used"), [(0.25, 0.05), (2.0, 0.4), (4.0, 0.2)])
def test_a_point_uses_so_much_of_the_places(answers, used):
    trace = Cell(answers, used, 7, 2.0).trace(requests=3_000)
    requests = requests_of(trace, trace.shape.names, 1000.0, 1)
    loads = [each.stages[0].output_tokens / 1000.0 for each in requests]
    places = trace.shape.nodes * trace.shape.places
    assert len(requests) == 3_000
    assert mean(loads) == pytest.approx(answers, rel=0.08), "the longest are cut"
    assert trace.running == pytest.approx(used * places)
    busy_s = sum(loads) * trace.shape.load_s
    assert busy_s / trace.duration_s == pytest.approx(used * places, rel=0.12)
    assert trace.shape.dram_models == 7


def test_the_map_is_all_that_the_flags_span():
    parser = argparse.ArgumentParser()
    add_map_flags(parser)
    flags = ["--answers", "1", "2", "--used", "0.1", "--memory", "4", "7", "--bursts", "2"]
    cells = list(cells_of(parser.parse_args(flags)))
    assert len({each.name for each in cells}) == len(cells) == 4
    assert {each.area for each in cells} == {
        "4 models in each memory, CV 2",
        "7 models in each memory, CV 2",
    }


def test_ratios_are_of_the_means():
    assert ratios_of(FIGURES) == (7.0 / 4.0, 6.0 / 4.0)


@pytest.mark.parametrize(("locality", "marked"), [(3.0, True), (2.9, False)])
def test_only_what_beats_both_is_marked(locality, marked):
    figures = {"ours": [2.0], "random": [9.0], "locality": [locality]}
    console = Console(width=120)
    with console.capture() as said:
        for table in tables_of({Cell(1.0, 0.1, 4, 2.0): figures}):
            console.print(table)
    field = f"2.00  4.50 / {locality / 2.0:.2f}"
    assert (f"{field}*" in said.get()) is marked
    assert field in said.get()
