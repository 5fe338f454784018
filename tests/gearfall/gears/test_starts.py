import math

import pytest

from gearfall.gears.starts import ALWAYS_WARM, StartTerms, Warmth

TERMS = {"small": StartTerms(0.2, 10.0), "large": StartTerms(3.0, 100.0)}


def test_a_start_by_hand():
    warmth = Warmth(10.0, TERMS)
    gone = math.exp(-0.1 * 2.0 * 10.0)
    wanted = math.exp(-2.0 * 10.0) * 0.2 * 10.0 + 0.1 * gone * 3.0 * 100.0
    assert warmth.start_cost(("small", "large"), (1.0, 0.1), 2.0) == pytest.approx(wanted)


def test_who_is_asked_often_or_never_is_not_started():
    warmth = Warmth(10.0, TERMS)
    assert warmth.start_cost(("small",), (1.0,), 100.0) < 1e-12
    assert warmth.start_cost(("small", "large"), (1.0, 0.0), 100.0) < 1e-12
    assert ALWAYS_WARM.start_cost(("anything",), (1.0,), 1e-9) == 0.0
    assert Warmth(0.0, TERMS).start_cost(("large",), (1.0,), 100.0) == 300.0
