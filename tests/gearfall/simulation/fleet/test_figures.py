"""The quantile of all reports."""

import pytest

from gearfall.simulation.fleet.figures import quantile


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 5.0), (0.99, 10.0), (0.9, 9.0), (0.0, 1.0), (1.0, 10.0)]
)
def test_quantiles_are_values_that_were_measured(share, expected):
    assert quantile(map(float, range(10, 0, -1)), share) == expected


def test_of_nothing_it_is_nothing():
    assert quantile([], 0.5) == 0.0
