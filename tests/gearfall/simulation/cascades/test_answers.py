"""What a simulation knows of answers: where a draft stops, how much of it is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile, ProfiledModel
from gearfall.simulation.cascades.answers import END, Answer, shared_tokens
from gearfall.simulation.cascades.profile_plan import queries_of

TOKENS = st.lists(st.integers(0, 2), max_size=6).map(tuple)


@pytest.mark.parametrize(
    ("threshold", "reach", "tokens"),
    [
        (None, (0.1, 0.1, 0.1, 0.1), 4),
        (0.5, (), 4),
        (0.5, (0.9, 0.8, 0.7, 0.6), 4),
        (0.5, (0.9, 0.4, 0.3, 0.3), 2),
        (0.5, (0.4, 0.4, 0.3, 0.3), 1),
        (0.5, (0.9, 0.5, 0.5, 0.5), 4),
    ],
)
def test_an_answer_ends_where_nothing_can_make_it_certain(threshold, reach, tokens):
    assert Answer(3, 4, 0.5, 1.0, 1.0, (), reach).tokens_until(threshold) == tokens


@given(TOKENS, TOKENS)
def test_shared_tokens_are_the_longest_common_beginning(draft, answer):
    count = shared_tokens(draft, answer)
    assert draft[:count] == answer[:count]
    assert count == min(len(draft), len(answer)) or draft[count] != answer[count]


def test_queries_have_the_end_of_answers_and_what_they_could_still_reach():
    ended = Generation(1.0, 9.0, 5, 3, (-0.1, -0.2, -0.3), (1.0,) * 3, token_ids=(7, 8))
    cut = Generation(1.0, 9.0, 5, 2, (-0.1, -0.1), (1.0,) * 2, token_ids=(7, 8))
    textless = Generation(0.0, 9.0, 5, 2, (-0.1, -0.1), (1.0,) * 2)
    model = ProfiledModel("m", generations=(ended, cut, textless))
    profile = Profile(1.0, "FLOP", ("a", "b", "c"), (model,))
    found = [query[ModelName("m")] for query in queries_of(profile, {}, "sequence_probability")]
    assert [each.token_ids for each in found] == [(7, 8, END), (7, 8), ()]
    assert found[0].reach == pytest.approx(
        (2.718281828**-0.1, 2.718281828**-0.3, 2.718281828**-0.6)
    )
    assert found[0].reach[-1] == pytest.approx(found[0].certainty)
    (only,) = queries_of(profile, {}, "sequence_probability", rows=[1])
    assert only[ModelName("m")] == found[1]
