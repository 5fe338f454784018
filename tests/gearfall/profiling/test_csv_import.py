import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.profiling.csv_import import import_csv

HEAD = "query,model,correct,confidence,cost,latency"


def imported(*rows: str, head: str = HEAD):
    return import_csv("\n".join((head, *rows)), made_unix_s=1.0, cost_unit="USD")


def test_rows_become_a_profile():
    profile = imported("q1,a,1,0.9,2.5,0.1", "q1,b,0,0.4,9,", "q2,b,1,0.8,9,", "q2,a,0,0.2,2.5,")
    assert profile.queries == ("q1", "q2")
    first, second = profile.model("a").generations
    assert (first.quality, first.certainty, first.cost, first.latency_s) == (1.0, 0.9, 2.5, 0.1)
    assert second.latency_s == 0.0


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        ((), "query,model", "missing correct, confidence, cost"),
        ((), HEAD + ",mood", "unknown mood"),
        ((), HEAD, "there is none"),
        (("q1,a,nan,0.5,1,",), HEAD, "quality: nan"),
        (("q1,a,1,inf,1,",), HEAD, "certainty: inf"),
        (("q1,a,1,1.5,1,",), HEAD, "certainty: 1.5"),
        (("q1,a,1,0.5,-1,",), HEAD, "cost: -1"),
        (("q1,a,yes,0.5,1,",), HEAD, "row 2: correct 'yes' is no number"),
        (("q1,a,1,0.5,1,", "q1,a,1,0.5,1,"), HEAD, "a second time"),
        (("q1,a,1,0.5,1,", "q2,b,1,0.5,1,"), HEAD, "a has no answer to q2"),
        (("q1,,1,0.5,1,",), HEAD, "a query, a model"),
        (("q1,a,1,0.5,1,,,,",), HEAD, "no further columns"),
        (("q1,a,1",), HEAD, "row 2: cost None is no number"),
        (('q1,"a,1,0.5,1',), HEAD, "no CSV"),
    ],
)
def test_what_is_no_profile_is_refused_by_its_row(rows, head, says):
    with pytest.raises(InvalidRequest, match=says):
        imported(*rows, head=head)
