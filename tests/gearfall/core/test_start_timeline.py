"""A start's timeline in words."""

import dataclasses

import pytest

from gearfall.core.start_timeline import PHASES, StartTimeline


def test_phases_come_in_order_with_the_rest_last():
    timeline = StartTimeline(total_s=1.0, first_token_s=0.25, ssd_s=0.5, prepare_s=0.125)
    assert timeline.phases() == (
        ("ssd", 0.5),
        ("prepare", 0.125),
        ("first token", 0.25),
        ("rest", 0.125),
    )


def test_no_phase_of_the_timeline_is_left_out():
    names = {field.name for field in dataclasses.fields(StartTimeline)}
    assert names - {"total_s", "from_tier"} == {f"{name.replace(' ', '_')}_s" for name in PHASES}


def test_what_the_clock_rounds_away_is_no_phase():
    timeline = StartTimeline(total_s=0.1 + 0.1 + 0.1, queued_s=0.1, ssd_s=0.1, build_s=0.1)
    assert [name for name, _ in timeline.phases()] == [
        "queued",
        "ssd",
        "build",
    ]
    assert StartTimeline().phases() == ()
    assert sum(s for _, s in StartTimeline(total_s=3.0, ssd_s=1.0).phases()) == pytest.approx(3.0)
