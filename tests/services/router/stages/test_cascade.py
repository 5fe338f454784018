"""The cascade's table, and that a client has one stage's answer in the end, whatever happened."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.escalation import Accept, Degraded, GiveUp, GoUp, Outcome, Settle
from gearfall.core.errors import Internal
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage
from services.router.stages.cascade import (
    BeginningDecided,
    CascadeState,
    Effect,
    Event,
    Fail,
    Finish,
    Piece,
    Release,
    Replace,
    StageDone,
    StageEnded,
    StageFailed,
    StageStopped,
    StartStage,
    Step,
    cost_flops,
    step,
)

TWO = (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
THREE = (Stage(ModelName("tiny"), 0.5), *TWO)
STOP = FinishReason.STOP
ERROR = Internal("broken")


def done(outcome: Outcome, finish: FinishReason = STOP) -> StageEnded:
    return StageEnded(StageDone(finish, 0.4), outcome)


def failed(outcome: Outcome) -> StageEnded:
    return StageEnded(StageFailed(ERROR), outcome)


def stopped(outcome: GoUp) -> StageEnded:
    return StageEnded(StageStopped(0.1, outcome), outcome)


def drafting(stages: tuple[Stage, ...]) -> CascadeState[str]:
    return CascadeState(stages, mode=StreamMode.DRAFT)


def deciding_early(stages: tuple[Stage, ...]) -> CascadeState[str]:
    return CascadeState(stages, mode=StreamMode.EARLY)


def play(state: CascadeState[str], *events: Event[str]) -> Step[str]:
    effects: tuple[Effect[str], ...] = ()
    for event in events:
        state, new = step(state, event)
        effects += new
    return state, effects


def test_a_certain_stage_releases_what_it_held():
    state, effects = play(CascadeState(TWO), Piece("a"), Piece("b"), done(Accept()))
    assert effects == (Release(("a", "b")), Finish(STOP, 0))
    assert state.is_done


def test_an_uncertain_stage_goes_up_and_the_last_one_streams():
    events = (Piece("a"), done(GoUp(1)), Piece("x"), Piece("y"), done(Accept()))
    _, effects = play(CascadeState(TWO), *events)
    assert effects == (StartStage(1), Release(("x",)), Release(("y",)), Finish(STOP, 1))


def test_a_failed_stage_goes_up_and_a_failed_last_stage_fails():
    state, effects = play(CascadeState(TWO), Piece("a"), failed(GoUp(1)), failed(GiveUp()))
    assert effects == (StartStage(1), Fail(ERROR))
    assert state.is_done


def test_an_empty_certain_answer_finishes():
    _, effects = play(CascadeState(TWO), done(Accept()))
    assert effects == (Finish(STOP, 0),)


def test_an_uncertain_answer_is_given_with_its_flag():
    _, effects = play(CascadeState(TWO), Piece("a"), done(Settle(Degraded.LOADING)))
    assert effects == (Release(("a",)), Finish(STOP, 0, Degraded.LOADING))


def test_a_stage_is_left_out():
    state, effects = play(CascadeState(THREE), Piece("a"), done(GoUp(2)))
    assert effects == (StartStage(2),)
    assert state.is_last


def test_the_newest_lower_answer_is_given_when_all_above_it_failed():
    events = (
        Piece("a"),
        done(GoUp(1)),
        Piece("b"),
        done(GoUp(2), FinishReason.LENGTH),
        failed(Settle(Degraded.DEADLINE)),
    )
    _, effects = play(CascadeState(THREE), *events)
    assert effects[2:] == (Release(("b",)), Finish(FinishReason.LENGTH, 1, Degraded.DEADLINE))


def test_a_failed_stage_leaves_the_lower_answer():
    events = (
        Piece("a"),
        done(GoUp(1)),
        Piece("half"),
        failed(GoUp(2)),
        failed(Settle(Degraded.DEADLINE)),
    )
    _, effects = play(CascadeState(THREE), *events)
    assert effects[2:] == (Release(("a",)), Finish(STOP, 0, Degraded.DEADLINE))


def test_a_lower_answer_stays_to_the_end_for_a_client_that_takes_it_whole():
    start: CascadeState[str] = CascadeState(TWO, is_whole=True)
    events = (Piece("a"), done(GoUp(1)), Piece("x"), Piece("y"))
    state, effects = play(start, *events)
    assert effects == (StartStage(1),)
    _, given = step(state, failed(Settle(Degraded.DEADLINE)))
    assert given == (Release(("a",)), Finish(STOP, 0, Degraded.DEADLINE))
    _, whole = step(state, done(Accept()))
    assert whole == (Release(("x", "y")), Finish(STOP, 1))


def test_a_first_stage_that_can_not_be_overruled_streams_to_everybody():
    start: CascadeState[str] = CascadeState(TWO[1:], is_whole=True)
    assert play(start, Piece("x"))[1] == (Release(("x",)),)


def test_a_lower_answer_is_gone_once_text_above_it_was_released():
    state, _ = play(CascadeState(TWO), Piece("a"), done(GoUp(1)))
    assert state.draft is not None
    state, _ = step(state, Piece("x"))
    assert state.draft is None


def test_a_draft_is_shown_at_once_and_stays_until_other_text_comes():
    events = (Piece("a"), Piece("b"), done(GoUp(1)), Piece("x"), Piece("y"), done(Accept()))
    _, effects = play(drafting(TWO), *events)
    assert effects == (
        Release(("a",)),
        Release(("b",)),
        StartStage(1),
        Replace(0, 1),
        Release(("x",)),
        Release(("y",)),
        Finish(STOP, 1),
    )


def test_a_draft_that_is_accepted_is_not_shown_again():
    _, effects = play(drafting(TWO), Piece("a"), done(Accept()))
    assert effects == (Release(("a",)), Finish(STOP, 0))


def test_an_empty_answer_replaces_a_draft_too():
    _, effects = play(drafting(TWO), Piece("a"), done(GoUp(1)), done(Accept()))
    assert effects == (Release(("a",)), StartStage(1), Replace(0, 1), Finish(STOP, 1))


def test_a_draft_that_stayed_is_given_without_being_shown_again():
    events = (Piece("a"), done(GoUp(1)), failed(Settle(Degraded.DEADLINE)))
    _, effects = play(drafting(TWO), *events)
    assert effects[2:] == (Finish(STOP, 0, Degraded.DEADLINE),)


def test_a_lower_draft_comes_back_when_the_one_above_it_failed_half_way():
    events = (
        Piece("a"),
        done(GoUp(1)),
        Piece("half"),
        failed(GoUp(2)),
        failed(Settle(Degraded.DEADLINE)),
    )
    _, effects = play(drafting(THREE), *events)
    assert effects[2:] == (
        Replace(0, 1),
        Release(("half",)),
        StartStage(2),
        Replace(1, 0),
        Release(("a",)),
        Finish(STOP, 0, Degraded.DEADLINE),
    )


def test_a_hopeless_draft_goes_up_and_is_no_answer():
    state, effects = play(CascadeState(TWO), Piece("a"), stopped(GoUp(1)))
    assert effects == (StartStage(1),)
    assert state.draft is None


def test_a_certain_beginning_is_released_and_the_rest_streams():
    events = (Piece("a"), BeginningDecided(Accept()), Piece("b"), done(Accept()))
    _, effects = play(deciding_early(TWO), *events)
    assert effects == (Release(("a",)), Release(("b",)), Finish(STOP, 0))


def test_a_beginning_without_text_yet_is_decided():
    state, effects = play(deciding_early(TWO), BeginningDecided(Accept()))
    assert effects == ()
    assert state.is_settled


def test_a_beginning_that_is_given_for_want_of_better_keeps_its_flag():
    settle = Settle(Degraded.OVERLOAD)
    _, effects = play(deciding_early(TWO), BeginningDecided(settle), Piece("b"), done(Accept()))
    assert effects == (Release(("b",)), Finish(STOP, 0, Degraded.OVERLOAD))


def test_an_uncertain_beginning_goes_up_unseen():
    events = (Piece("a"), stopped(GoUp(1)), Piece("x"), done(Accept()))
    _, effects = play(deciding_early(TWO), *events)
    assert effects == (StartStage(1), Release(("x",)), Finish(STOP, 1))


def test_a_stage_that_fails_behind_its_beginning_fails_the_choice():
    events = (Piece("a"), BeginningDecided(Accept()), failed(GiveUp()))
    _, effects = play(deciding_early(TWO), *events)
    assert effects == (Release(("a",)), Fail(ERROR))


class Client:
    """What somebody has who does as the effects say."""

    def __init__(self) -> None:
        self.has: list[tuple[int, int]] = []
        self.replaced = 0
        self.ends: list[Finish | Fail] = []

    def take(self, effect: Effect[tuple[int, int]]) -> None:
        assert not self.ends, "nothing comes behind the end"
        if isinstance(effect, Release):
            self.has += effect.pieces
        elif isinstance(effect, Replace):
            assert {stage for stage, _ in self.has} == {effect.dropped}
            assert effect.index != effect.dropped
            self.replaced += 1
            self.has.clear()
        elif isinstance(effect, (Finish, Fail)):
            self.ends.append(effect)
        assert len({stage for stage, _ in self.has}) <= 1, "never two stages' text together"


@pytest.mark.parametrize("mode", StreamMode)
@given(data=st.data())
def test_the_client_has_exactly_one_stages_answer_in_the_end(mode, data):
    stages = (*(Stage(ModelName("m"), 0.5) for _ in range(data.draw(st.integers(0, 3)))), TWO[1])
    state: CascadeState[tuple[int, int]]
    state = CascadeState(stages, mode=mode, is_whole=data.draw(st.booleans()))
    client = Client()
    answers: dict[int, list[tuple[int, int]]] = {}
    seen: list[tuple[int, list[tuple[int, int]]]] = []
    while not state.is_done:
        events = data.draw(_stage_events(state))
        answers[state.index] = [each.piece for each in events if isinstance(each, Piece)]
        for event in (*events, None):
            state, effects = step(state, event or data.draw(_ends(state)))
            for effect in effects:
                client.take(effect)
            seen.append((client.replaced, list(client.has)))
    (end,) = client.ends
    if isinstance(end, Finish):
        assert client.has == answers[end.index]
        assert all(has == client.has[: len(has)] for at, has in seen if at == client.replaced)
    if mode is not StreamMode.DRAFT:
        assert client.replaced == 0


def _stage_events(
    state: CascadeState[tuple[int, int]],
) -> st.SearchStrategy[list[Event[tuple[int, int]]]]:
    """A stage's pieces and, with `early`, perhaps the decision on its beginning among them."""
    count = st.integers(0, 3)
    is_open = state.mode is StreamMode.EARLY and not state.is_settled
    outcomes: list[Accept | Settle] = [Accept(), Settle(Degraded.OVERLOAD)]

    @st.composite
    def events(draw: st.DrawFn) -> list[Event[tuple[int, int]]]:
        drawn: list[Event[tuple[int, int]]] = []
        drawn += [Piece((state.index, at)) for at in range(draw(count))]
        if is_open and draw(st.booleans()):
            drawn.insert(draw(count), BeginningDecided(draw(st.sampled_from(outcomes))))
        return drawn

    return events()


def _ends(state: CascadeState[tuple[int, int]]) -> st.SearchStrategy[StageEnded]:
    """Every end of a stage that the decision may come to."""
    if state.is_settled:
        lower = [] if state.draft is None else [failed(Settle(Degraded.DEADLINE))]
        return st.sampled_from([done(Accept()), failed(GiveUp()), *lower])
    ups = [GoUp(to) for to in range(state.index + 1, len(state.stages))]
    settle = Settle(Degraded.DEADLINE)
    of_done: list[Outcome] = [Accept(), settle, *ups]
    of_failed: list[Outcome] = [*ups, *([] if state.draft is None else [settle])]
    return st.sampled_from(
        [*map(done, of_done), *map(stopped, ups), *map(failed, of_failed)],
    )


def test_cost():
    assert cost_flops(1000, 9) == 18000.0
