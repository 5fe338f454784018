"""The cascade's table, and that nothing of an overruled stage is ever released."""

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import Internal
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
    StageFailed,
    StartStage,
    Step,
    cost_flops,
    step,
)

TWO = (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
STOP = FinishReason.STOP
ERROR = Internal("broken")


def play(state: CascadeState[str], *events: Event[str]) -> Step[str]:
    effects: tuple[Effect[str], ...] = ()
    for event in events:
        state, new = step(state, event)
        effects += new
    return state, effects


def test_a_certain_stage_releases_what_it_held():
    state, effects = play(CascadeState(TWO), Piece("a"), Piece("b"), StageDone(STOP, 0.5))
    assert effects == (Release(("a", "b")), Finish(STOP))
    assert state.is_done


def test_an_uncertain_stage_goes_up_and_the_last_one_streams():
    events = (Piece("a"), StageDone(STOP, 0.49), Piece("x"), Piece("y"), StageDone(STOP, 0.0))
    _, effects = play(CascadeState(TWO), *events)
    assert effects == (StartStage(1), Release(("x",)), Release(("y",)), Finish(STOP))


def test_a_failed_stage_goes_up_and_a_failed_last_stage_fails():
    state, effects = play(CascadeState(TWO), Piece("a"), StageFailed(ERROR), StageFailed(ERROR))
    assert effects == (StartStage(1), Fail(ERROR))
    assert state.is_done


def test_an_empty_certain_answer_finishes():
    _, effects = play(CascadeState(TWO), StageDone(STOP, 1.0))
    assert effects == (Finish(STOP),)


@given(
    thresholds=st.lists(st.floats(0, 1), max_size=3),
    data=st.data(),
)
def test_releases_exactly_the_answering_stage(thresholds, data):
    stages = (*(Stage(ModelName("m"), each) for each in thresholds), Stage(ModelName("last")))
    state: CascadeState[tuple[int, int]] = CascadeState(stages)
    released: list[tuple[int, int]] = []
    finished = 0
    answers = {}
    while not state.is_done:
        index = state.index
        pieces = [(index, i) for i in range(data.draw(st.integers(0, 3)))]
        answers[index] = pieces
        fails = data.draw(st.booleans())
        last = StageFailed(ERROR) if fails else StageDone(STOP, data.draw(st.floats(0, 1)))
        for event in (*map(Piece, pieces), last):
            state, effects = step(state, event)
            for effect in effects:
                if isinstance(effect, Release):
                    released += effect.pieces
                finished += isinstance(effect, (Finish, Fail))
    assert finished == 1
    assert released == answers[state.index] or (fails and state.is_last)


def test_cost():
    assert cost_flops(1000, 9) == 18000.0
