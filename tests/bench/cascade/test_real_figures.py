"""Sums over requests and rounds, by hand."""

from dataclasses import replace

import pytest

from bench.cascade.real_figures import (
    Figures,
    Outcome,
    Run,
    busiest,
    cost_ratios,
    figures_of,
    loss_of,
    miss_of,
    moments,
    over_rounds,
)


def outcome(at_s: float, total_s: float = 1.0, quality: float = 1.0, cost: float = 10.0) -> Outcome:
    return Outcome(at_s, int(at_s), total_s, quality, cost, 2, "m", int(at_s))


def run(system: str, number: int, *outcomes: Outcome, device_s: float = 1.0) -> Run:
    return Run(system, number, outcomes, device_s)


def test_a_run_in_numbers():
    found = figures_of(
        run("a", 0, *(outcome(n, total_s=n, quality=n % 2, cost=n) for n in range(1, 101)))
    )
    assert (found.requests, found.quality, found.cost) == (100, 0.5, 50.5)
    assert (found.p50_s, found.p95_s, found.p99_s) == (50, 95, 99)
    assert (found.p40_s, found.p60_s) == (40, 60)
    assert found.device_s == 0.01
    with pytest.raises(ValueError, match="a answered nothing"):
        figures_of(run("a", 0))


def test_the_middle_round_counts():
    rounds = [run("a", n, outcome(0, total_s=t)) for n, t in enumerate((5.0, 1.0, 2.0))]
    other = run("b", 0, outcome(0, total_s=9.0))
    assert over_rounds([*rounds, other], "a").p95_s == 2.0
    assert over_rounds([*rounds, other], "a").requests == 3


def test_a_loss_is_counted_request_by_request():
    large = run("large", 0, *(outcome(n, quality=1.0) for n in range(4)))
    ours = run("ours", 0, *(outcome(n, quality=float(n > 0)) for n in range(4)))
    loss = loss_of([large, ours], "ours", "large")
    assert loss.mean == 0.25
    assert loss.error == pytest.approx((0.25 * 0.75) ** 0.5 / 2)
    assert loss_of([large, ours], "large", "ours").mean == -0.25
    with pytest.raises(ValueError, match="zip"):
        loss_of([large, run("ours", 0, outcome(0))], "ours", "large")


def test_asking_the_same_questions_again_does_not_make_a_loss_surer():
    once = loss_of(_lossy_rounds(1, 1), "ours", "large")
    assert loss_of(_lossy_rounds(9, 1), "ours", "large") == once
    assert loss_of(_lossy_rounds(2, 5), "ours", "large") == once


def _lossy_rounds(rounds: int, repeats: int) -> list[Run]:
    large = [outcome(n, quality=1.0) for n in range(4)] * repeats
    ours = [outcome(n, quality=float(n > 0)) for n in range(4)] * repeats
    return [
        run(name, number, *found)
        for number in range(rounds)
        for name, found in (("large", large), ("ours", ours))
    ]


def test_ratios_are_of_the_same_round():
    runs = [
        run("large", 0, outcome(0, cost=30.0)),
        run("ours", 0, outcome(0, cost=10.0)),
        run("ours", 1, outcome(0, cost=10.0)),
        run("large", 1, outcome(0, cost=50.0)),
    ]
    assert cost_ratios(runs, "ours", "large", lambda each: each.cost) == (3.0, 5.0)


def test_moments_are_pieces_of_the_time_in_which_requests_were_due():
    first, second = moments([outcome(0.5), outcome(1.9, total_s=3.0), outcome(4.1, quality=0)], 2.0)
    assert (first.at_s, first.per_s, first.p95_s, first.quality, first.gear) == (1, 1, 3.0, 1, 0.5)
    assert (second.at_s, second.per_s, second.quality, second.gear) == (5.0, 0.5, 0.0, 4.0)


def test_the_busiest_fifth_of_the_time():
    calm = [outcome(n + 0.5) for n in range(10)]
    crowd = [outcome(3.1 + n / 100) for n in range(5)] + [outcome(7.1), outcome(7.2)]
    assert sorted(int(each.at_s) for each in busiest([*calm, *crowd], 1.0)) == [3] * 6 + [7] * 3


def test_how_far_a_prediction_is_off():
    measured = Figures(10, 0.9, 100.0, 1.0, 2.0, 4.0, 8.0, 1.5, 0.1, 0.2, 0.7, 1.5, 3.0, 0.5)
    predicted = Figures(10, 0.9, 110.0, 0.5, 1.9, 5.0, 8.0, 1.5, 0.1, 0.2, 0.7, 1.5, 3.0, 0.5)
    miss = miss_of(predicted, measured)
    assert (miss.p50, miss.p95, miss.p99) == pytest.approx((-0.05, 0.25, 0.0))
    assert (miss.cost, miss.device) == pytest.approx((0.1, -0.5))
    assert miss.within({"p50": 0.05 + 1e-9, "cost": 0.1 + 1e-9})
    assert not miss.within({"p50": 0.04})
    assert not miss.within({"p95": 0.2})


def test_who_was_answered_by_the_first_stage():
    first = [replace(outcome(n), stages=stages) for n, stages in enumerate((1, 2, 3, 1, 2))]
    assert figures_of(run("a", 0, *first)).one_stage == pytest.approx(0.4)


def test_the_parts_of_the_time_are_all_of_it():
    first = replace(outcome(0.0), queued_s=0.1, engine_s=0.3)
    run = Run("ours", 0, (first, replace(outcome(1.0), engine_s=0.2)), 1.0)
    found = figures_of(run)
    mean_s = sum(each.total_s for each in run.outcomes) / 2
    assert (found.queued_s, found.engine_s) == pytest.approx((0.05, 0.25))
    assert found.door_s == pytest.approx(mean_s - 0.3)
