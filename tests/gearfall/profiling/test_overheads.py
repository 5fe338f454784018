"""Overheads of the fastest model for all that were measured on its device kind."""

from dataclasses import replace

from gearfall.core.profile import ProfiledModel, Speed
from gearfall.profiling.overheads import with_common_overheads
from gearfall.profiling.speed import MOST_TOLD


def speed(step_s: float, job_s: float, request_s: float, wake_s: float, tell_s: float) -> Speed:
    return Speed(
        0.5, step_s, 0.25, ((1, step_s), (4, 2 * step_s)), job_s, request_s, wake_s, tell_s
    )


def model(name: str, **speeds: Speed) -> ProfiledModel:
    return ProfiledModel(name, "d" * 32, 10**6, 4, speeds, {"ssd": 1.0}, ())


SMALL = speed(0.25, job_s=0.5, request_s=0.25, wake_s=0.125, tell_s=0.0625)
LARGE = speed(8.0, job_s=0.25, request_s=6.0, wake_s=0.0, tell_s=2.0)


def test_a_single_model_keeps_what_was_measured():
    assert with_common_overheads([model("l", cpu=LARGE)]) == (model("l", cpu=LARGE),)


def test_the_fastest_says_what_jobs_take_beside_their_steps_and_each_its_own_steps():
    large, small = with_common_overheads([model("l", cpu=LARGE), model("s", cpu=SMALL)])
    assert small.speeds["cpu"] == SMALL
    said = replace(LARGE, request_s=0.5, wake_s=0.125, tell_s=0.0625)
    assert large.speeds["cpu"] == said


def test_a_worker_computes_no_more_for_a_job_than_all_of_its_way_takes():
    long = replace(LARGE, job_s=3.0)
    large, _ = with_common_overheads([model("l", cpu=long), model("s", cpu=SMALL)])
    assert (large.speeds["cpu"].job_s, large.speeds["cpu"].request_s) == (0.75, 0.0)


def test_another_device_kind_has_a_fastest_of_its_own():
    large, small = with_common_overheads([model("l", cuda=LARGE), model("s", cpu=SMALL)])
    assert (large.speeds, small.speeds) == ({"cuda": LARGE}, {"cpu": SMALL})


def test_telling_takes_no_more_than_most_of_the_shortest_step():
    slow = replace(SMALL, tell_s=0.2)
    quick = replace(LARGE, steps=((1, 0.125),))
    large, _ = with_common_overheads([model("l", cpu=quick), model("s", cpu=slow)])
    assert large.speeds["cpu"].tell_s == MOST_TOLD * 0.125
