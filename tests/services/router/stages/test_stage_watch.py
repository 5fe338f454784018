"""When a stage is decided on its beginning, and when its draft is stopped."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.certainty.certainty import MEASURES
from gearfall.core.certainty.escalation import Accept, Degraded, GoUp, Outcome, Settle
from gearfall.core.generation.streaming import Streaming, StreamMode
from services.router.stages.cascade import BeginningDecided, StageStopped
from services.router.stages.stage_watch import StageWatch, Yardstick

SEQUENCE = Yardstick("sequence_probability")
MEAN = Yardstick("mean_token_probability")
HALF = math.log(0.5)


class Judge:
    """Decides by the threshold, unless told what becomes of uncertain answers; counts questions."""

    def __init__(self, threshold: float, uncertain: Outcome | None = None) -> None:
        self.threshold = threshold
        self.uncertain = uncertain or GoUp(1)
        self.asked: list[float] = []

    def __call__(self, certainty: float) -> Outcome:
        self.asked.append(certainty)
        return Accept() if certainty >= self.threshold else self.uncertain


def watch_of(
    yardstick=SEQUENCE, streaming=None, *, threshold=0.4, max_tokens=10, judge=None, worth=0
) -> StageWatch:
    """`worth`: tokens that a draft is worth having."""
    judge = judge or Judge(threshold)
    return StageWatch(
        yardstick,
        streaming or Streaming(),
        threshold=threshold,
        max_tokens=max_tokens,
        judge=judge,
        judge_stop=judge,
        is_worth_a_token=lambda drafted: drafted < worth,
    )


def signs(watch, logprobs, *, sizes=None, is_whole=True):
    """What it says after each run of one token, or of as many as `sizes` say."""
    said, at = [], 0
    for size in sizes or [1] * len(logprobs):
        at += size
        seen = logprobs[:at]
        ends = is_whole and at == len(logprobs)
        said.append(watch.look(seen, [2.0] * len(seen), is_whole=ends))
    return said


def stopped(certainty: float) -> object:
    """Equal to a stop on about that certainty."""
    return StageStopped(pytest.approx(certainty), GoUp(1))  # type: ignore[arg-type]


def early(hold_tokens):
    return Streaming(StreamMode.EARLY, hold_tokens)


def test_a_draft_stops_at_the_token_that_makes_it_hopeless():
    said = signs(watch_of(), [0.0, HALF, HALF, 0.0])
    assert said == [None, None, stopped(0.25), None]


def test_a_mean_stops_when_the_tokens_left_can_not_lift_it():
    # After the third, 0.5^3 over ten tokens is 0.812; nine would be needed for 0.8.
    assert signs(watch_of(MEAN, threshold=0.8), [HALF] * 3)[-1] is None
    (*_, last) = signs(watch_of(MEAN, threshold=0.8), [HALF] * 4, is_whole=False)
    assert last == stopped(0.5**0.4)


def test_a_whole_answer_is_not_stopped():
    assert signs(watch_of(), [HALF, HALF]) == [None, None]


def test_drafts_are_finished_where_the_deployment_says_so():
    streaming = Streaming(finishes_drafts=True)
    assert signs(watch_of(streaming=streaming), [HALF] * 5, is_whole=False) == [None] * 5


def test_a_hopeless_draft_goes_on_while_that_is_worth_it():
    assert signs(watch_of(worth=4), [HALF] * 6, is_whole=False)[:4] == [
        *[None] * 3,
        stopped(0.5**4),
    ]
    assert signs(watch_of(worth=9), [HALF] * 6) == [None] * 6, "it ends before"


def test_drafts_are_stopped_at_once_where_the_deployment_says_so():
    watch = watch_of(streaming=Streaming(finishes_drafts=False), worth=9)
    assert signs(watch, [HALF] * 3, is_whole=False)[1] == stopped(0.25)


def test_what_has_no_bound_is_never_stopped():
    unknown = Calibration(("mood",), (0.0,), (1.0,), (1.0,), 0.0, ((0.0, 0.0), (1.0, 1.0)))
    watch = watch_of(Yardstick("", unknown), threshold=1.0)
    assert signs(watch, [-30.0] * 5, is_whole=False) == [None] * 5


def test_a_calibrated_draft_stops_within_an_eighth_more_tokens():
    """Its bound is the probability of the first token that is not certain."""
    by_least = Calibration(("min",), (0.0,), (1.0,), (1.0,), 0.0, ((0.0, 0.0), (1.0, 1.0)))
    for sure in range(40):
        watch = watch_of(Yardstick("", by_least), threshold=0.4, max_tokens=99)
        said = signs(watch, [0.0] * sure + [-5.0] * 20, is_whole=False)
        at = next(number for number, each in enumerate(said) if each is not None)
        assert isinstance(said[at], StageStopped)
        assert sure <= at <= sure + sure // 8 + 1


def test_a_draft_that_may_not_go_up_goes_on_and_is_asked_about_now_and_then():
    judge = Judge(0.4, Settle(Degraded.OVERLOAD))
    assert signs(watch_of(judge=judge, max_tokens=99), [HALF] * 16, is_whole=False) == [None] * 16
    assert judge.asked == pytest.approx([0.5**2, 0.5**4, 0.5**8, 0.5**16])


def test_a_certain_beginning_is_decided_once():
    said = signs(watch_of(streaming=early(2)), [0.0, HALF, HALF, HALF])
    assert said == [None, BeginningDecided(Accept()), None, None]


@pytest.mark.parametrize("streaming", [None, early(2)])
def test_where_a_plan_knows_beginnings_only_they_are_measured(streaming):
    """In every mode: what follows changes nothing."""
    yardstick = Yardstick("sequence_probability", tokens=2)
    assert yardstick.certainty([HALF, 0.0, -9.0], [2.0] * 3) == pytest.approx(0.5)
    said = signs(watch_of(yardstick, streaming), [HALF, 0.0, -9.0, -9.0], is_whole=False)
    assert not any(isinstance(each, StageStopped) for each in said)
    mean = Yardstick("mean_token_probability", tokens=2)
    said = signs(watch_of(mean, streaming, threshold=0.6), [-1.0, HALF, 0.0, 0.0], is_whole=False)
    assert said.index(stopped(math.exp((HALF - 1.0) / 2))) == 1


def test_an_uncertain_beginning_goes_up_at_once():
    # Each token alone is as certain as it must be: only their mean says so, and only at the end.
    said = signs(watch_of(MEAN, early(3), threshold=0.6), [0.0, HALF, -2.0, 0.0])
    assert said[:3] == [None, None, stopped(math.exp((HALF - 2) / 3))]


def test_a_beginning_is_hopeless_before_it_is_whole():
    said = signs(watch_of(MEAN, early(4), threshold=0.8, max_tokens=1000), [HALF, HALF, HALF])
    assert said[1] == stopped(0.5**0.5)


def test_a_beginning_that_may_not_go_up_is_given_with_its_flag():
    settle = Settle(Degraded.LOADING)
    said = signs(watch_of(streaming=early(2), judge=Judge(0.4, settle)), [HALF, HALF, HALF])
    assert said == [None, BeginningDecided(settle), None]


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_an_answer_no_longer_than_its_beginning_is_decided_whole(tokens):
    judge = Judge(0.0)
    assert signs(watch_of(streaming=early(3), judge=judge), [0.0] * tokens) == [None] * tokens
    assert judge.asked == []


def test_the_beginning_is_the_same_however_many_tokens_come_at_once():
    judge = Judge(0.4)
    said = signs(watch_of(streaming=early(2), judge=judge), [HALF, 0.0, -9.0, -9.0], sizes=[4])
    assert said == [BeginningDecided(Accept())]
    assert judge.asked == [pytest.approx(0.5)]


LOGPROBS = st.lists(st.floats(-3, 0) | st.just(0.0), min_size=1, max_size=12)


@pytest.mark.parametrize("measure", MEASURES)
@given(logprobs=LOGPROBS, threshold=st.floats(0, 1), spare=st.integers(0, 3))
def test_never_stops_what_would_be_accepted(measure, logprobs, threshold, spare):
    yardstick = Yardstick(measure)
    limit = len(logprobs) + spare
    watch = watch_of(yardstick, threshold=threshold, max_tokens=limit)
    stops = [each for each in signs(watch, logprobs) if each is not None]
    if stops:
        assert yardstick.certainty(logprobs, [2.0] * len(logprobs)) < threshold


@given(
    logprobs=LOGPROBS,
    threshold=st.floats(0, 1),
    hold_tokens=st.integers(1, 14),
    measure=st.sampled_from(sorted(MEASURES)),
    data=st.data(),
)
def test_whether_it_goes_up_does_not_depend_on_how_tokens_came(
    logprobs, threshold, hold_tokens, measure, data
):
    yardstick, margins = Yardstick(measure), [2.0] * len(logprobs)

    def goes_up(sizes):
        watch = watch_of(yardstick, early(hold_tokens), threshold=threshold, max_tokens=12)
        said = [each for each in signs(watch, logprobs, sizes=sizes) if each is not None]
        assert len(said) <= 1
        if not said:
            return yardstick.certainty(logprobs, margins) < threshold
        return isinstance(said[0], StageStopped)

    sizes, left = [], len(logprobs)
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    assert goes_up(sizes) == goes_up([1] * len(logprobs))
