import numpy as np
import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.gears.answers import MIN_QUERIES, check_answers
from tests.gearfall.gears.answers import answers

N = 30
RIGHT = [0.0, 1.0] * (N // 2)
SURE = list(np.linspace(0.0, 1.0, N))


def broken(values, place, value):
    found = list(values)
    found[place] = value
    return found


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([], "no answers of any model"),
        ([answers("a", RIGHT, SURE), answers("a", RIGHT, SURE)], "there twice"),
        ([answers("a", broken(RIGHT, 3, float("nan")), SURE)], "correct of query 3 is nan"),
        ([answers("a", RIGHT, broken(SURE, 4, float("inf")))], "certainty of query 4 is inf"),
        ([answers("a", RIGHT, broken(SURE, 5, 1.5))], "certainty of query 5 is 1.5"),
        ([answers("a", RIGHT, SURE, -1.0)], "cost of query 0 is -1"),
        ([answers("a", RIGHT, SURE, 0.0)], "costs nothing"),
        ([answers("a", RIGHT[:5], SURE[:5])], f"at least {MIN_QUERIES}"),
        ([answers("a", RIGHT, SURE), answers("b", RIGHT[:-2], SURE[:-2])], "28 values of correct"),
        ([answers("a", RIGHT, SURE[:-1])], "29 values of certainty"),
        ([answers("a", [1.0] * N, SURE), answers("b", [1.0] * N, SURE)], "one class only"),
    ],
)
def test_what_can_not_be_planned_from_is_refused_with_what_to_change(models, says):
    with pytest.raises(InvalidRequest, match=says):
        check_answers(models)


def test_the_cheapest_comes_first():
    dear, cheap = answers("a", RIGHT, SURE, 2.0), answers("b", RIGHT[::-1], SURE, 1.0)
    assert [each.model for each in check_answers([dear, cheap])] == ["b", "a"]
