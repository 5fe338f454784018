import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.token_entropy import entropy_bound, pair_entropy


def entropy(shares) -> float:
    return -math.fsum(share * math.log(share) for share in shares if share > 0.0)


@given(
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=12).map(
        lambda found: sorted((each / sum(found) for each in found), reverse=True)
    ),
    st.data(),
)
def test_it_is_below_the_entropy_and_rises_with_what_is_known(shares, data):
    few = data.draw(st.integers(1, len(shares)))
    more = data.draw(st.integers(few, len(shares)))
    logs = [math.log(each) for each in shares]
    low, high = entropy_bound(logs[:few]), entropy_bound(logs[:more])
    assert 0.0 <= low <= high + 1e-9
    assert high <= entropy(shares) + 1e-9


@pytest.mark.parametrize(
    ("shares", "known"), [((0.5, 0.5), 2), ((0.4, 0.3, 0.2, 0.1), 4), ((0.25,) * 4, 1)]
)
def test_it_is_the_entropy_where_nothing_is_hidden_or_all_are_alike(shares, known):
    assert entropy_bound([math.log(each) for each in shares[:known]]) == pytest.approx(
        entropy(shares)
    )


def test_a_pair_is_two_alternatives():
    assert pair_entropy(math.log(0.6), math.log(3.0)) == pytest.approx(
        entropy_bound([math.log(0.6), math.log(0.2)])
    )
    assert pair_entropy(0.0, math.inf) == 0.0
    assert pair_entropy(-math.inf, 0.0) == math.inf
    assert math.isnan(pair_entropy(math.nan, 1.0))
