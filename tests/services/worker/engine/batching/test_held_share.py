"""Held jobs' part of a step: those that decode hardly notice it, and it comes to an end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.held_share import FIRST_TOKENS, GROWTH, PATIENCE_S, HeldShare
from services.worker.engine.batching.sequence import Chunk, Sequence, Stance

DECODE_S, TOKEN_S = 0.040, 0.001


def sequence(name, stance=Stance.FREE, whole_by_s=0.0):
    return Sequence(
        JobId(name), Epoch(1), [1] * 99, 99, SamplingParams(max_tokens=1),
        stance=stance, whole_by_s=whole_by_s,
    )  # fmt: skip


ROWS = [sequence(f"row{number}") for number in range(8)]
DECODING = [(row, 1) for row in ROWS]


def chunks_of(rows, held=0):
    decoding = [Chunk(row, 98, 1) for row in ROWS[:rows]]
    return decoding + ([Chunk(sequence("h", Stance.HELD), 0, held)] if held else [])


def measured(*, decode_s=DECODE_S, token_s=TOKEN_S):
    share = HeldShare()
    for _ in range(5):
        share.note(chunks_of(8), decode_s)
        share.note(chunks_of(8, 20), decode_s + 20 * token_s)
    return share


def find(share, missing, *, running=DECODING, whole_by_s=PATIENCE_S, now_s=0.0):
    held = sequence("held", Stance.HELD, whole_by_s)
    return share.find([*running, (held, missing)], now_s)


def test_the_share_makes_a_step_no_longer_than_it_may():
    assert find(measured(), 500) == int(GROWTH * DECODE_S / TOKEN_S) == 6


def test_a_share_that_seems_to_cost_nothing_grows_by_steps():
    share = measured(token_s=0.0)
    for expected in (40, 80, 160):
        assert find(share, 500) == expected
        share.note(chunks_of(8, expected), DECODE_S)
    for _ in range(2):
        share.note(chunks_of(8, 160), DECODE_S + 160 * TOKEN_S)
    assert find(share, 500) <= 30, "and falls as soon as it costs something"


def test_steps_that_took_a_little_less_by_chance_open_no_gate():
    share = measured()
    for late_s in (0.004, -0.004, -0.003, 0.003) * 5:
        share.note(chunks_of(8, 1), DECODE_S + TOKEN_S + late_s)
    assert find(share, 500) <= FIRST_TOKENS


def test_a_step_of_nobody_else_is_all_theirs():
    prefilling = [(sequence("p"), 30)]
    assert find(measured(), 4096, running=[]) == 4096
    assert find(measured(), 4096, running=prefilling) == 4096


def test_before_anything_was_measured_the_share_is_small():
    assert find(HeldShare(), 500) == FIRST_TOKENS
    assert find(HeldShare(), 2) == 2


def test_nobody_held_has_a_share_of_nothing():
    assert measured().find(DECODING, 0.0) == 0
    assert measured().find([*DECODING, (sequence("kv", Stance.HELD_BY_KV), 0)], 0.0) == 0


def test_a_step_whose_rows_were_never_seen_is_taken_for_the_nearest():
    share = measured()
    share.note(chunks_of(1), 0.010)
    assert find(share, 500, running=DECODING[:2]) == 1
    assert find(share, 500, running=DECODING[:7]) == 6


@given(
    missing=st.integers(1, 4096),
    decode_s=st.floats(0.005, 0.1),
    token_s=st.floats(1e-5, 0.004),
    rows=st.integers(1, 8),
    within_s=st.floats(0.5, PATIENCE_S),
)
def test_a_held_job_is_whole_in_time_or_as_fast_as_can_be(
    missing, decode_s, token_s, rows, within_s
):
    share, now_s, left = measured(decode_s=decode_s, token_s=token_s), 0.0, missing
    while left > 0:
        count = find(share, left, running=DECODING[:rows], whole_by_s=within_s, now_s=now_s)
        assert 1 <= count <= left
        left -= count
        step_s = decode_s + count * token_s
        share.note(chunks_of(rows, count), step_s)
        now_s += step_s
    as_fast_as_can_be_s = decode_s + missing * token_s
    assert now_s <= 1.1 * max(within_s, as_fast_as_can_be_s) + 6 * decode_s


def test_one_step_that_the_machine_held_up_does_not_change_the_share():
    share = measured()
    share.note(chunks_of(8, 6), DECODE_S)
    share.note(chunks_of(8, 6), 3.0)
    assert find(share, 1000) == 6
    share.note(chunks_of(8, 6), 3.0)
    assert find(share, 1000) > 6, "steps are slow: more must come in each"


@pytest.mark.parametrize("late_s", [PATIENCE_S, PATIENCE_S + 9])
def test_a_job_whose_patience_has_ended_gets_all(late_s):
    assert find(measured(), 300, now_s=late_s) == 300
    assert find(measured(), 300, whole_by_s=late_s + PATIENCE_S, now_s=late_s) == 6


def test_a_job_waits_for_passes_beside_the_steps_as_long_as_they_are_in_time():
    share = measured()
    assert share.can_wait(4096, PATIENCE_S), "nothing is known yet: it is tried"
    assert not share.can_wait(1, 0.0)
    share.note_beside(FIRST_TOKENS, 0.5)
    assert share.can_wait(4096, PATIENCE_S), "of so few none says how fast many are"
    for _ in range(3):
        share.note_beside(64, 0.64)
    assert share.can_wait(900, 9.1)
    assert not share.can_wait(900, 8.9)
    for _ in range(4):
        share.note_beside(64, 6.4)
    assert not share.can_wait(900, 9.1), "passes have become slow"


def test_a_pass_that_nobody_can_take_back_leaves_time_for_others():
    share = HeldShare()
    assert share.fit_pass(64, PATIENCE_S) == FIRST_TOKENS, "nothing is known yet"
    assert share.fit_pass(2, PATIENCE_S) == 2
    share.note_beside(4, 0.4)
    assert share.fit_pass(64, 8.0) == 20, "a quarter of the time"
    assert share.fit_pass(64, PATIENCE_S) == share.fit_pass(64, float("inf")) == 64
    assert share.fit_pass(64, 0.1) == share.fit_pass(64, -1.0) == 1
    for _ in range(4):
        share.note_beside(64, 0.0)
    assert share.fit_pass(64, 0.1) == 64
