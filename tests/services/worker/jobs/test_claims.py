"""The claims' table, row by row, and the promise that no claimed entry is left without an end."""

import re

from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import Priority
from gearfall.core.ids import Epoch, JobId
from gearfall.core.ports import QueuedJob
from services.worker.jobs import claims
from services.worker.jobs.claims import TRANSITIONS, ClaimBook, ClaimEvent, ClaimState, Effect
from tests.services.worker.fakes import FINISH, MODEL, job, run_of

KEY = (JobId("job-1"), Epoch(1))


def book_with(state):
    book = ClaimBook()
    if state is ClaimState.HELD:
        book.hold(job())
        return book
    book.add(QueuedJob("1-0", job(), 1))
    path = {
        ClaimState.UNSETTLED: (),
        ClaimState.RUNNING: (ClaimEvent.CONNECTED,),
        ClaimState.FINISHING: (ClaimEvent.CONNECTED, ClaimEvent.FINAL_RUN),
        ClaimState.LOST: (ClaimEvent.CONNECTED, ClaimEvent.ENGINE_DIED),
    }[state]
    for event in path:
        book.apply(KEY, event)
    return book


def test_the_docstring_is_the_table():
    rows = re.findall(
        r"^    (\w+) +(\w+(?: \w+)?) {2,}([\w-]+)(?: {2,}(.+))?$", claims.__doc__, re.MULTILINE
    )
    stated = {
        (ClaimState(state), ClaimEvent(event)): (
            None if after == "-" else ClaimState(after),
            tuple(Effect(text) for text in effects.split(", ")) if effects else (),
        )
        for state, event, after, effects in rows
        if state != "state"
    }
    assert stated == TRANSITIONS


def test_every_state_can_end_and_only_an_end_acknowledges():
    for (state, _), (after, effects) in TRANSITIONS.items():
        has_entry = state is not ClaimState.HELD
        assert (after is None and has_entry) == (Effect.ACKNOWLEDGE in effects)
    for state in ClaimState:
        assert TRANSITIONS[state, ClaimEvent.ROUTER_GONE][0] is None


def test_pairs_outside_the_table_change_nothing():
    for state in ClaimState:
        for event in ClaimEvent:
            if (state, event) not in TRANSITIONS:
                book = book_with(state)
                assert book.apply(KEY, event) == ()
                assert book.get(KEY).state is state


def test_a_redelivered_entry_is_acknowledged_with_the_first():
    book = ClaimBook()
    assert book.add(QueuedJob("1-0", job(), 1))
    assert not book.add(QueuedJob("2-0", job(), 1))
    assert not book.add(QueuedJob("2-0", job(), 2))
    (todo,) = book.apply(KEY, ClaimEvent.STOP)
    assert todo.entry_ids == ("1-0", "2-0")


def test_two_epochs_of_a_job_are_two_claims():
    book = ClaimBook()
    assert book.add(QueuedJob("1-0", job(epoch=1), 1))
    assert book.add(QueuedJob("2-0", job(epoch=2), 1))
    assert book.occupied_slots(MODEL) == 2


def test_slots_of_batch_jobs_that_run_here_can_be_had_by_others():
    book = ClaimBook()
    for name, priority in (
        ("a", Priority.BATCH),
        ("b", Priority.BATCH),
        ("c", Priority.INTERACTIVE),
    ):
        book.add(QueuedJob(f"{name}-0", job(name, priority=priority), 1))
    book.hold(job("moving", priority=Priority.BATCH))
    assert (book.occupied_slots(MODEL), book.displaceable_slots(MODEL)) == (4, 2)
    book.apply((JobId("a"), Epoch(1)), ClaimEvent.ROUTER_GONE)
    assert (book.occupied_slots(MODEL), book.displaceable_slots(MODEL)) == (3, 1)


def test_tokens_are_taken_only_in_order_and_only_while_running():
    resumed = job(generated=(5, 6))
    book = ClaimBook()
    book.add(QueuedJob("1-0", resumed, 1))
    assert book.take(run_of(resumed, 2)) is None
    book.apply(KEY, ClaimEvent.CONNECTED)
    assert book.take(run_of(resumed, 0)) is None
    assert book.take(run_of(resumed, 2, tokens=(1, 2))) is not None
    assert book.take(run_of(resumed, 2)) is None
    assert book.take(run_of(resumed, 4, finish=FINISH)) is not None
    book.apply(KEY, ClaimEvent.FINAL_RUN)
    assert book.take(run_of(resumed, 5)) is None


def test_an_older_submissions_tokens_are_dropped_after_a_reconnection():
    book = book_with(ClaimState.RUNNING)
    assert book.take(run_of(job(), 0)) is not None
    book.apply(KEY, ClaimEvent.BROKEN)
    book.apply(KEY, ClaimEvent.CONNECTED)
    assert book.take(run_of(job(), 1)) is None
    assert book.take(run_of(job(), 0)) is not None


def test_what_an_older_submissions_run_said_is_cut_from_those_of_the_next():
    book = book_with(ClaimState.RUNNING)
    assert book.take(run_of(job(), 0, tokens=(5, 6))) is not None
    assert book.take(run_of(job(), 0, tokens=(5,))) is None
    taken = book.take(run_of(job(), 1, tokens=(6, 7)))
    assert taken is not None
    claim, new = taken
    assert (new.index, new.token_ids, len(new.logprobs), len(new.margins)) == (2, (7,), 1, 1)
    assert (claim.next_index, claim.token_ids) == (3, [5, 6, 7])
    taken = book.take(run_of(job(), 2, tokens=(7,), finish=FINISH))
    assert taken is not None, "its end is new"
    assert (taken[1].index, taken[1].token_ids, taken[1].finish) == (3, (), FINISH)


def test_what_a_released_job_brings_is_held_back_until_the_grant():
    moved = job(epoch=2, generated=(5, 6))
    key = (moved.job_id, moved.epoch)
    book = ClaimBook()
    assert book.hold(moved)
    assert not book.hold(moved)
    assert book.occupied_slots(MODEL) == 1
    assert book.take(run_of(moved, 2)) is None
    book.release(key, (5, 6, 7, 7))
    assert book.take(run_of(moved, 3)) is None
    assert book.take(run_of(moved, 4)) is None
    assert book.take(run_of(moved, 5)) is None
    claim = book.get(key)
    assert claim is not None
    assert [run.index for run in claim.held_back] == [4, 5]
    assert claim.token_ids == [5, 6, 7, 7, 7, 7]
    book.check()
    (todo,) = book.apply(key, ClaimEvent.GRANTED)
    assert todo.effect is Effect.PUSH_HELD_BACK
    assert book.take(run_of(moved, 6)) == (claim, run_of(moved, 6))
    (_, acknowledge) = book.apply(key, ClaimEvent.STOP)
    assert (acknowledge.effect, acknowledge.entry_ids) == (Effect.ACKNOWLEDGE, ())


EVENTS = st.tuples(st.integers(0, 3), st.integers(1, 2), st.sampled_from(list(ClaimEvent)))
STEPS = st.lists(st.one_of(EVENTS, st.tuples(st.integers(0, 3), st.integers(1, 2))), max_size=60)


@given(STEPS)
def test_every_claimed_entry_is_acknowledged_exactly_once_in_the_end(steps):
    book = ClaimBook()
    claimed: list[str] = []
    acknowledged: list[str] = []

    def apply(key, event):
        for todo in book.apply(key, event):
            if todo.effect is Effect.ACKNOWLEDGE:
                acknowledged.extend(todo.entry_ids)

    for number, step in enumerate(steps):
        name = f"job-{step[0]}"
        if len(step) == 2:
            claimed.append(f"{number}-0")
            book.add(QueuedJob(claimed[-1], job(name, epoch=step[1]), 1))
        else:
            apply((JobId(name), step[1]), step[2])
        book.check()
        assert 0 <= book.occupied_slots(MODEL) <= len(book)
    for claim in book:
        apply(claim.key, ClaimEvent.ROUTER_GONE)
    assert len(book) == 0
    assert sorted(acknowledged) == sorted(claimed)


@given(STEPS)
def test_an_engine_is_told_of_a_job_between_submit_and_cancel_only(steps):
    """A job is submitted when the engine does not have it, cancelled only when it may."""
    book, running = ClaimBook(), set()
    for number, step in enumerate(steps):
        key = (JobId(f"job-{step[0]}"), step[1])
        if len(step) == 2:
            book.add(QueuedJob(f"{number}-0", job(key[0], epoch=key[1]), 1))
            continue
        if step[2] in {ClaimEvent.FINAL_RUN, ClaimEvent.ENGINE_DIED}:
            running.discard(key)
        for todo in book.apply(key, step[2]):
            if todo.effect is Effect.SUBMIT:
                assert key not in running
                running.add(key)
            elif todo.effect is Effect.CANCEL:
                assert key in running
                running.remove(key)
    for key in running:
        claim = book.get(key)
        assert claim is not None
        assert claim.state is ClaimState.RUNNING
