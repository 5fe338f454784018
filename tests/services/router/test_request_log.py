"""What is remembered of requests, and what was decided meanwhile."""

import pytest

from gearfall.core.errors import NotFound
from gearfall.core.ids import ModelName, RequestId
from gearfall.core.records import DecisionRecord
from services.router.request_log import MAX_EVENTS, RequestEvent, RequestLog, decisions_within

A, B = RequestId("a"), RequestId("b")


def event(at_unix_s: float, decision: str = "claimed", model: str = "") -> RequestEvent:
    return RequestEvent(at_unix_s, decision, "because", model)


def test_the_oldest_request_goes_and_of_a_long_one_the_middle():
    log = RequestLog(max_requests=1)
    for number in range(MAX_EVENTS + 3):
        log.add(A, event(float(number)))
    found = [each.at_unix_s for each in log.events(A)]
    assert (found[0], found[-1], len(found)) == (MAX_EVENTS + 2.0, 0.0, MAX_EVENTS)
    log.add(B, event(1.0))
    with pytest.raises(NotFound):
        log.events(A)


@pytest.mark.parametrize(
    ("at_unix_s", "model", "is_told"),
    [(5.0, "small", True), (0.5, "small", False), (9.5, "small", False), (5.0, "large", False)],
)
def test_decisions_count_that_were_made_about_its_models_on_its_way(at_unix_s, model, is_told):
    events = (event(9.0, "finished"), event(2.0, "queued", "small"), event(1.0, "admitted"))
    decision = DecisionRecord(ModelName(model), at_unix_s, "wait", "no worker has room")
    found = decisions_within(events, {decision.model: decision})
    assert found == ((decision,) if is_told else ())
