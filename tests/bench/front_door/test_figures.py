"""Reading the load generator's figures and summing them up over rounds."""

import json
from typing import Any

import pytest

from bench.front_door.figures import (
    FLOOR,
    Cell,
    LoadFigures,
    Run,
    added_latencies,
    parse_load,
    ratios,
    summarize,
)
from bench.measuring.spread import Spread

ONE_USER = Cell(is_stream=False, users=1)
MANY = Cell(is_stream=True, users=16)
LINE: dict[str, Any] = {
    "requests": 100,
    "failures": 2,
    "duration_s": 4.0,
    "p50_ms": 1.5,
    "p95_ms": 2.0,
    "p99_ms": 3.0,
    "max_ms": 9.0,
}


def make_run(
    round_index: int,
    target: str,
    cell: Cell = ONE_USER,
    *,
    rate: int = 100,
    p50_ms: float = 1.0,
    failures: int = 0,
    cpu: dict[str, float] | None = None,
) -> Run:
    load = LoadFigures(rate, failures, 1.0, p50_ms, 2 * p50_ms, 3 * p50_ms, 4 * p50_ms)
    return Run(round_index, target, cell, load, cpu or {})


def test_the_last_line_is_read() -> None:
    figures = parse_load(f"some notice\n{json.dumps(LINE)}\n")
    assert figures.requests_per_s == 25.0
    assert (figures.failures, figures.p99_ms) == (2, 3.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        json.dumps(LINE | {"requests": 0}),
        json.dumps(LINE | {"duration_s": 0}),
        json.dumps({name: LINE[name] for name in LINE if name != "p50_ms"}),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_load(text)


def test_rounds_are_summed_up_by_target_and_load() -> None:
    runs = [
        make_run(0, "router", rate=10, failures=1, cpu={"router": 2.0}),
        make_run(1, "router", rate=30, failures=2, cpu={"router": 6.0, "redis": 1.0}),
        make_run(2, "router", rate=20, cpu={"router": 4.0, "redis": 3.0}),
        make_run(0, "router", MANY, rate=7),
    ]
    one, many = summarize(runs)
    assert (one.cell, many.cell) == (ONE_USER, MANY)
    assert one.requests_per_s == Spread(20, 10, 30)
    assert one.failures == 3
    assert one.cpu_ms_per_request == {"router": 4.0, "redis": 2.0}
    assert many.requests_per_s == Spread(7, 7, 7)


def test_added_latency_is_taken_round_by_round_with_one_user() -> None:
    runs = [
        make_run(0, FLOOR, p50_ms=1.0),
        make_run(0, "router", p50_ms=4.0),
        make_run(1, FLOOR, p50_ms=11.0),  # a slow moment of the machine hits both
        make_run(1, "router", p50_ms=13.0),
        make_run(0, FLOOR, MANY, p50_ms=1.0),
        make_run(0, "router", MANY, p50_ms=100.0),
    ]
    (added,) = added_latencies(runs)
    assert (added.target, added.is_stream) == ("router", False)
    assert added.added_ms == Spread(2.5, 2.0, 3.0)


def test_ratios_pair_the_same_round_and_load_only() -> None:
    runs = [
        make_run(0, "ours", rate=30, p50_ms=1.0),
        make_run(0, "theirs", rate=10, p50_ms=4.0),
        make_run(1, "ours", rate=80),
        make_run(0, "ours", MANY),
    ]
    (found,) = ratios(runs, "ours", "theirs")
    assert found.cell == ONE_USER
    assert found.requests_per_s == Spread(3.0, 3.0, 3.0)
    assert found.p50_ms == Spread(0.25, 0.25, 0.25)


def test_without_a_peer_there_is_no_ratio() -> None:
    assert ratios([make_run(0, "ours")], "ours", "theirs") == ()
