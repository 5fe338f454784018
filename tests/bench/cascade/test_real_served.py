"""How slow workers were, from steps that were made up."""

import pytest

from bench.cascade.real_machine import CoreTime, MachineSample
from bench.cascade.real_served import (
    MOST_TAKEN,
    Piece,
    WorkerStep,
    mean_slowness,
    pieces_of,
    references,
    slowness,
    steps_by_node,
    taken_share,
)
from services.worker.engine.step_log import LoggedStep

KNOWN = {("large", 1): 0.1, ("large", 8): 0.2, ("small", 1): 0.01}
BEGUN_S = 100.0


def step(end_s: float, step_s: float, core_s: float, tokens: int = 1, model: str = "large"):
    return WorkerStep(model, LoggedStep(BEGUN_S + end_s, tokens, step_s, core_s))


def pieces(count: int, host_s: float = 0.0) -> list[Piece]:
    return [Piece(BEGUN_S + n, BEGUN_S + n + 1, host_s) for n in range(count)]


def slow(steps, count: int, host_s: float = 0.0) -> list[float]:
    found = slowness(steps, pieces(count, host_s), KNOWN, BEGUN_S)
    assert [at_s for at_s, _ in found] == pytest.approx(list(range(count)))
    return [factor for _, factor in found]


def test_references_are_medians_of_shapes_that_were_met_often_enough():
    often = [step(n, step_s, 0.05) for n, step_s in enumerate((0.1, 0.1, 0.2, 0.3, 9.0))]
    seldom = [step(n, 1.0, 0.4, tokens=2) for n in range(4)]
    assert references([*often, *seldom]) == {("large", 1): 0.2}


def test_steps_are_beside_their_like_and_larger_ones_make_nobody_slow():
    steps = [
        step(0.3, 0.12, 0.12),
        step(0.6, 0.2, 0.2, tokens=8),
        step(0.7, 0.01, 0.01, model="small"),
    ]
    assert slow(steps, 1) == [pytest.approx(0.33 / 0.31)]


def test_a_piece_without_work_or_with_none_that_is_known_is_as_slow_as_the_one_before():
    steps = [step(1.5, 0.2, 0.2), step(2.5, 0.7, 0.7, tokens=99), step(4.5, 0.1, 0.1)]
    assert slow(steps, 5) == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.0])


def test_engines_of_one_worker_make_each_other_no_slower():
    """Two that share a core take twice as long each, and each as much of it as ever."""
    steps = [step(0.8, 0.2, 0.1), step(0.8, 0.2, 0.1)]
    assert slow(steps, 1) == [pytest.approx(1.0)]


def test_a_host_s_own_work_is_not_taken_by_others_and_the_rest_is():
    steps = [step(0.8, 0.16, 0.1)]
    assert slow(steps, 1, host_s=0.06) == [pytest.approx(1.0)]
    assert slow(steps, 1, host_s=0.03) == [pytest.approx(0.16 / 0.13)]
    assert taken_share(steps, 0.03) == pytest.approx(0.03 / 0.16)


def test_what_others_took_has_a_bound_and_no_step_is_no_time():
    assert taken_share([step(0.9, 0.9, 0.001)], 0.0) == MOST_TAKEN
    assert taken_share([], 0.5) == 0.0
    assert taken_share([step(0.2, 0.1, 0.1), step(0.9, 0.1, 0.1)], 0.0) == pytest.approx(0.0)


def test_pieces_lie_between_samples_and_have_the_host_s_time_in_them():
    samples = [
        MachineSample(at_s, {"node-1": CoreTime(run_s, 0.0), "router": CoreTime(9.0, 0.0)})
        for at_s, run_s in ((5.0, 1.0), (5.5, 1.25), (6.0, 1.0))
    ]
    assert pieces_of(samples, "node-1") == (Piece(5.0, 5.5, 0.25), Piece(5.5, 6.0, 0.0))


def test_steps_are_parted_by_node_and_an_engine_that_did_nothing_needs_none():
    logged = LoggedStep(1.0, 1, 0.1, 0.1)
    found = steps_by_node({1: (logged,), 2: (logged,), 3: ()}, {1: ("a", "s"), 2: ("a", "l")})
    assert found == {"a": [WorkerStep("s", logged), WorkerStep("l", logged)]}


def test_the_mean_is_over_workers_and_pieces():
    assert mean_slowness({"a": ((0.0, 1.0), (0.5, 2.0)), "b": ((0.0, 3.0),)}) == pytest.approx(2.0)
