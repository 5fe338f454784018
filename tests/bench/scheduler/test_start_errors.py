"""The error of predictions, and the noise that no prediction can know."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.scheduler.start_errors import errors, noise_floor


@dataclass(frozen=True)
class Took:
    measured_s: float
    predicted_s: float = 0.0
    waited_s: float = 0.0
    model: str = "m"
    tier: str = "ssd"
    beside: int = 0


def test_the_error_is_relative_to_what_was_measured():
    assert errors([Took(2.0, 1.0), Took(1.0, 1.5)]) == pytest.approx([0.5, 0.5])


def test_each_start_is_held_against_its_repeats_only():
    rows = [Took(1.0), Took(1.1), Took(2.0), Took(9.0, tier="dram"), Took(5.0, model="other")]
    assert noise_floor(rows) == pytest.approx([0.55, 0.4 / 1.1, 0.95 / 2.0])


def test_what_was_waited_behind_others_is_no_noise():
    rows = [Took(1.0, beside=2), Took(3.0, waited_s=2.0, beside=2), Took(7.0)]
    assert noise_floor(rows) == pytest.approx([0.0, 0.0])


@given(st.lists(st.floats(0.001, 1e3), max_size=9), st.floats(0.01, 100.0))
def test_noise_is_there_where_repeats_are_and_knows_no_unit(times, factor):
    found = noise_floor([Took(each) for each in times])
    assert len(found) == (len(times) if len(times) > 1 else 0)
    assert all(each >= 0.0 for each in found)
    scaled = noise_floor([Took(each * factor) for each in times])
    assert scaled == pytest.approx(found, abs=1e-9)
