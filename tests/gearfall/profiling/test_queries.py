import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.profiling.queries import agreement_rule, parse_queries


def test_queries_are_named_and_judged():
    lines = [
        '{"id": "a", "prompt": "1+1=", "answer": "2"}',
        "",
        '{"prompt": "say yes", "answer": "yes", "match": "contains"}',
        '{"prompt": "a number", "answer": "[0-9]+", "match": "regex"}',
    ]
    exact, contains, regex = parse_queries(lines)
    assert [each.name for each in (exact, contains, regex)] == ["a", "3", "4"]
    assert [exact.judge(text) for text in (" 2\n", "2.", "12")] == [1.0, 0.0, 0.0]
    assert [contains.judge(text) for text in ("oh yes!", "no")] == [1.0, 0.0]
    assert [regex.judge(text) for text in ("42 ", "4 2")] == [1.0, 0.0]
    assert agreement_rule([exact]) == "exact"
    assert agreement_rule([exact, contains]) == "normalised"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no query"),
        (["{"], "line 1 is no JSON"),
        (["[]"], "line 1: an object"),
        (['{"prompt": "a"}'], "prompt and answer"),
        (['{"prompt": "a", "answer": 2}'], "are texts"),
        (['{"prompt": "a", "answer": "b", "extra": "c"}'], "extra"),
        (['{"prompt": "a", "answer": "b", "match": "like"}'], "'like' is not one of"),
        (['{"prompt": "", "answer": "b"}'], "prompt is empty"),
        (['{"prompt": "a", "answer": "(", "match": "regex"}'], "no regex"),
        (['{"id": "x", "prompt": "a", "answer": "b"}'] * 2, "x is there twice"),
    ],
)
def test_what_can_not_be_asked_is_refused_by_its_line(lines, says):
    with pytest.raises(InvalidRequest, match=says):
        parse_queries(lines)
