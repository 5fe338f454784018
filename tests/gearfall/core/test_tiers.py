"""Who makes room: properties of the choice and of the decayed count."""

import math

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from gearfall.core.tiers import Candidate, UseCount, choose_victims

TIMES = st.floats(0, 1e6)
CANDIDATES = st.lists(
    st.tuples(st.integers(1, 1000), st.sampled_from([0.0, 1e8, 1e9]), st.floats(0, 50)), max_size=8
).map(lambda rows: [Candidate(ModelName(f"m{i}"), *values) for i, values in enumerate(rows)])


def candidate(name: str, size_bytes: int, *, use: float = 1.0, bytes_per_s: float = 1e9):
    return Candidate(ModelName(name), size_bytes, bytes_per_s, use)


def test_the_cheapest_to_bring_back_goes_first():
    models = [candidate("often", 10, use=5.0), candidate("seldom", 10, use=0.1)]
    assert choose_victims(models, 10) == ("seldom",)
    models = [candidate("far", 10, bytes_per_s=1e8), candidate("near", 10)]
    assert choose_victims(models, 10) == ("near",)
    assert choose_victims(models, 11) == ("near", "far")
    assert choose_victims(models, 21) == ()


def test_what_is_more_than_needed_stays():
    models = [candidate("small", 1, use=0.1), candidate("large", 100, use=1.0)]
    assert choose_victims(models, 50) == ("large",)


def test_ties_fall_in_the_order_given():
    models = [candidate("old", 10), candidate("new", 10)]
    assert choose_victims(models, 5) == ("old",)


@given(CANDIDATES, st.integers(-5, 5000))
def test_enough_is_freed_and_nobody_in_vain(candidates: list[Candidate], missing_bytes: int):
    victims = choose_victims(candidates, missing_bytes)
    sizes = {found.model: found.size_bytes for found in candidates}
    freed = sum(sizes[victim] for victim in victims)
    possible = sum(sizes.values()) >= missing_bytes > 0
    assert (freed >= missing_bytes) if possible else not victims
    assert len(set(victims)) == len(victims)
    assert all(freed - sizes[victim] < missing_bytes for victim in victims)


@given(CANDIDATES.filter(bool), st.data())
def test_more_use_never_makes_a_model_a_victim(candidates: list[Candidate], data: st.DataObject):
    """With equal sizes the choice is exact, so that it must be monotonic."""
    equal = [Candidate(c.model, 100, c.bytes_per_s, c.use) for c in candidates]
    missing = data.draw(st.integers(1, 100 * len(equal)))
    before = choose_victims(equal, missing)
    spared = [found for found in equal if found.model not in before]
    if spared:
        lucky = data.draw(st.sampled_from(spared))
        raised = [
            Candidate(c.model, 100, c.bytes_per_s, c.use + (1 if c is lucky else 0)) for c in equal
        ]
        assert lucky.model not in choose_victims(raised, missing)


@given(st.lists(TIMES, max_size=20), TIMES)
def test_a_count_is_the_sum_of_its_decayed_uses(uses: list[float], extra_s: float):
    count = UseCount()
    for time_s in sorted(uses):
        count = count.used(time_s, half_life_s=100.0)
    now_s = max(uses, default=0.0) + extra_s
    expected = math.fsum(0.5 ** ((now_s - time_s) / 100.0) for time_s in uses)
    assert math.isclose(count.at(now_s, half_life_s=100.0), expected, rel_tol=1e-9, abs_tol=1e-12)


@given(TIMES, TIMES)
def test_a_clock_that_goes_back_adds_nothing(first_s: float, second_s: float):
    count = UseCount().used(first_s)
    assert count.at(min(first_s, second_s)) == 1.0
    assert 1.0 <= count.used(second_s).weight <= 2.0
