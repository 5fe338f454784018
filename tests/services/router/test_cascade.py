"""The cascade's table, and that nothing of an overruled stage is ever released."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import Internal
from gearfall.core.escalation import Accept, Degraded, GiveUp, GoUp, Outcome, Settle
from gearfall.core.ids import ModelName
from gearfall.core.job import FinishReason
from gearfall.core.records import Stage
from services.router.cascade import (
    CascadeState,
    Effect,
    Event,
    Fail,
    Finish,
    Piece,
    Release,
    StageDone,
    StageEnded,
    StageFailed,
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


def test_a_lower_answer_is_gone_once_text_above_it_was_released():
    state, _ = play(CascadeState(TWO), Piece("a"), done(GoUp(1)))
    assert state.draft is not None
    state, _ = step(state, Piece("x"))
    assert state.draft is None


@given(data=st.data())
def test_releases_exactly_one_stage_and_ends_once(data):
    stages = (*(Stage(ModelName("m"), 0.5) for _ in range(data.draw(st.integers(0, 3)))), TWO[1])
    state: CascadeState[tuple[int, int]] = CascadeState(stages)
    released: list[tuple[int, int]] = []
    ends: list[Finish | Fail] = []
    answers = {}
    while not state.is_done:
        index = state.index
        pieces = [(index, i) for i in range(data.draw(st.integers(0, 3)))]
        answers[index] = pieces
        for event in (*map(Piece, pieces), None):
            state, effects = step(state, event or data.draw(_ends(state)))
            for effect in effects:
                if isinstance(effect, Release):
                    released += effect.pieces
                elif isinstance(effect, (Finish, Fail)):
                    ends.append(effect)
    (end,) = ends
    if isinstance(end, Finish):
        assert released == answers[end.index]
    else:
        assert released in ([], answers[len(stages) - 1])


def _ends(state: CascadeState[tuple[int, int]]) -> st.SearchStrategy[StageEnded]:
    """Every end of a stage that the decision may come to."""
    ups: list[Outcome] = [GoUp(to) for to in range(state.index + 1, len(state.stages))]
    settle = Settle(Degraded.DEADLINE)
    of_done = [Accept(), *ups, *([] if state.is_last else [settle])]
    of_failed = [*ups, *([] if state.draft is None else [settle])] or [GiveUp()]
    return st.sampled_from([*map(done, of_done), *map(failed, of_failed)])


def test_cost():
    assert cost_flops(1000, 9) == 18000.0
