"""Who comes first: classes, levels, quanta and the bound on waiting."""

import pytest

from services.worker.engine.batching.feedback_levels import (
    BATCH_PATIENCE_S,
    FIRST_QUANTUM_TOKENS,
    LEVELS,
    PATIENCE_S,
    PREFILL_TOKENS_PER_STEP,
    charge,
    enter,
    lift_if_due,
)


def job(prefill=1, *, is_batch=False, arrival=0, now_s=0.0):
    return enter(prefill, is_batch=is_batch, arrival=arrival, now_s=now_s)


@pytest.mark.parametrize(
    ("prefill_quanta", "level"), [(0, 0), (1, 0), (1.1, 1), (2, 1), (16, 4), (17, 5), (1000, 5)]
)
def test_a_job_joins_the_first_level_whose_quantum_its_prefill_fits(prefill_quanta, level):
    standing = job(int(prefill_quanta * FIRST_QUANTUM_TOKENS * PREFILL_TOKENS_PER_STEP))
    assert standing.level == level
    assert standing.quantum_left == FIRST_QUANTUM_TOKENS << level


def test_a_used_up_quantum_costs_a_level_and_doubles_the_next():
    standing = job()
    spent = []
    for level in range(LEVELS + 1):
        assert standing.level == min(level, LEVELS - 1)
        count = 0
        before = standing.level
        while standing.level == before and count < FIRST_QUANTUM_TOKENS << LEVELS:
            charge(standing, 1.0)
            count += 1
        spent.append(count)
    assert spent[: LEVELS - 1] == [FIRST_QUANTUM_TOKENS << level for level in range(LEVELS - 1)]
    assert spent[-1] == FIRST_QUANTUM_TOKENS << LEVELS, "the last level has no end"


def test_interactive_comes_before_batch_level_before_level_first_before_second():
    long_prompt = 100 * FIRST_QUANTUM_TOKENS * PREFILL_TOKENS_PER_STEP
    expected = [
        job(arrival=2),
        job(arrival=5),
        job(long_prompt, arrival=1),
        job(is_batch=True, arrival=0),
        job(long_prompt, is_batch=True, arrival=0),
    ]
    shuffled = [expected[place] for place in (3, 0, 4, 2, 1)]
    assert sorted(shuffled, key=lambda one: one.order) == expected
    assert expected[0].rank == expected[1].rank, "arrival alone displaces nobody"


@pytest.mark.parametrize(
    ("is_batch", "patience_s"), [(False, PATIENCE_S), (True, BATCH_PATIENCE_S)]
)
def test_patience_ends_and_lifts_for_one_quantum(is_batch, patience_s):
    starved = job(10**6, is_batch=is_batch)
    lift_if_due(starved, patience_s - 0.01)
    assert not starved.is_lifted
    lift_if_due(starved, patience_s)
    assert starved.rank < job().rank
    for _ in range(FIRST_QUANTUM_TOKENS):
        assert starved.is_lifted
        charge(starved, patience_s)
    assert not starved.is_lifted
    assert starved.rank > job().rank
    lift_if_due(starved, 2 * patience_s - 0.01)
    assert not starved.is_lifted, "its last token was not so long ago"


def test_lifting_twice_is_lifting_once():
    starved = job()
    lift_if_due(starved, 100.0)
    charge(starved, 100.0)
    left = starved.quantum_left
    lift_if_due(starved, 200.0)
    assert starved.quantum_left == left
