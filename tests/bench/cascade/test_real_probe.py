"""What a probe's measures say, and what is predicted by them."""

from dataclasses import replace

import pytest

from bench.cascade.real_figures import figures_of
from bench.cascade.real_prediction import Predictor, one_gear
from bench.cascade.real_probe import PROFILED, Pace, at_pace, pace_of
from gearfall.core.profile import Speed, check_profile
from gearfall.core.records import Stage
from tests.bench.cascade.test_real_prediction import CASCADE, PLAN, PREDICTOR, PROFILE, WINDOW


@pytest.mark.parametrize(
    ("steps", "ways", "pace"),
    [
        ([1.0, 1.2, 9.0], [0.5, 0.7], Pace(1.2, 0.6)),
        ([1.1], [], Pace(1.1, 1.0)),
    ],
)
def test_the_median_of_what_was_seen(steps, ways, pace):
    assert pace_of(steps, ways) == pace


def test_a_speed_at_another_pace_is_slower_all_over():
    speed = Speed(0.5, 0.25, 1.5, ((1, 0.5), (4, 0.75)), 0.5, 0.75, 0.25, 0.125)
    model = replace(PROFILE.models[0], speeds={"cpu": speed})
    profile = replace(PROFILE, models=(model,))
    (found,) = at_pace(profile, Pace(2.0, 3.0)).models
    slow = Speed(1.0, 0.5, 3.0, ((1, 1.0), (4, 1.5)), 1.5, 2.25, 0.75, 0.25)
    assert found.speeds["cpu"] == slow
    check_profile(at_pace(profile, Pace(0.01, 100.0)))
    assert at_pace(profile, PROFILED) == profile


def test_a_machine_at_half_its_speed_takes_twice_as_long_and_queues_where_it_did_not():
    stage = Stage(CASCADE.stages[1].model)
    alone = one_gear(PLAN, "alone", replace(CASCADE, stages=(stage,)))
    halved = Predictor(at_pace(PROFILE, Pace(2.0, 1.0)), PREDICTOR.workers)
    calm, slow = (
        figures_of(each.predict(alone, WINDOW, 1.0, 60.0)) for each in (PREDICTOR, halved)
    )
    assert slow.p50_s == pytest.approx(2 * calm.p50_s, rel=0.01)
    crowded, jammed = (
        figures_of(each.predict(alone, WINDOW, 16.0, 10.0)) for each in (PREDICTOR, halved)
    )
    assert jammed.p95_s > 3 * crowded.p95_s
