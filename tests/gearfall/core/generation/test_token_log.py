"""The token log: its table, and a state machine of workers, delays and losses."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.token_log import (
    MAX_BARREN_EPOCHS,
    Appended,
    Bound,
    Broken,
    Duplicate,
    HandedOver,
    Kept,
    LogState,
    Refused,
    TokenLog,
)
from gearfall.core.ids import Epoch, JobId, WorkerId

JOB = JobId("job")
A, B = WorkerId("a"), WorkerId("b")
TRUTH = tuple(range(100, 112))


def run(index: int, *token_ids: int, epoch: int = 1, finish: FinishReason | None = None):
    numbers = tuple(float(-token) for token in token_ids)
    return TokenRun(JOB, Epoch(epoch), index, token_ids, numbers, numbers, finish=finish)


def owned() -> TokenLog:
    log = TokenLog(JOB)
    assert log.claim(A, Epoch(1)) == Bound()
    return log


def test_appends_only_the_owner_at_the_next_index():
    log = owned()
    assert isinstance(log.append(A, run(0, 7, 8)), Appended)
    assert isinstance(log.append(B, run(2, 9)), Refused)
    assert isinstance(log.append(A, run(2, 9, epoch=2)), Refused)
    assert isinstance(log.append(A, run(0, 7, 8)), Duplicate)
    assert isinstance(log.append(A, run(3, 9)), Broken)
    assert isinstance(log.append(A, run(1, 5)), Broken)
    assert log.token_ids == [7, 8]


def test_takes_the_new_tail_of_a_run():
    log = owned()
    log.append(A, run(0, 7, 8))
    verdict = log.append(A, run(1, 8, 9))
    assert verdict == Appended(run(2, 9))
    assert log.logprobs == [-7.0, -8.0, -9.0]


def test_the_time_of_known_tokens_is_not_counted_twice():
    log = owned()
    log.append(A, replace(run(0, 7, 8), device_s=2.0))
    verdict = log.append(A, replace(run(0, 7, 8, 9, 10), device_s=4.0))
    assert verdict == Appended(replace(run(2, 9, 10), device_s=2.0))


def test_waiting_log_takes_no_token():
    assert isinstance(TokenLog(JOB).append(A, run(0, 7)), Refused)


def test_claims():
    log = owned()
    assert log.claim(A, Epoch(1)) == Bound()
    assert isinstance(log.claim(B, Epoch(1)), Refused)
    assert isinstance(log.claim(B, Epoch(2)), Refused)
    assert log.owners == 1


def test_loss_fences_the_owner():
    log = owned()
    log.append(A, run(0, 7))
    assert log.lose() == 2
    assert isinstance(log.append(A, run(1, 8)), Refused)
    assert isinstance(log.claim(A, Epoch(1)), Refused)
    assert log.claim(B, Epoch(2)) == Bound()
    assert isinstance(log.append(B, run(1, 8, epoch=2)), Appended)
    assert log.token_ids == [7, 8]


def test_finishes_once():
    log = owned()
    verdict = log.append(A, run(0, 7, finish=FinishReason.STOP))
    assert isinstance(verdict, Appended)
    assert log.state is LogState.FINISHED
    assert isinstance(log.append(A, run(0, 7, finish=FinishReason.STOP)), Duplicate)
    assert isinstance(log.append(A, run(1, 8)), Refused)
    assert isinstance(log.append(B, run(0, 7)), Refused)
    assert isinstance(log.claim(A, Epoch(1)), Refused)


def test_a_run_with_nothing_but_a_finish_counts():
    log = owned()
    verdict = log.append(A, run(0, finish=FinishReason.ERROR))
    assert isinstance(verdict, Appended)
    assert verdict.run.finish is FinishReason.ERROR


def test_barren_epochs_poison_and_a_token_heals():
    log = TokenLog(JOB)
    for epoch in range(1, MAX_BARREN_EPOCHS):
        log.claim(A, Epoch(epoch))
        log.lose()
    assert not log.is_poisoned
    log.claim(A, log.epoch)
    log.append(A, run(0, 7, epoch=log.epoch))
    log.lose()
    for _ in range(MAX_BARREN_EPOCHS):
        assert not log.is_poisoned
        log.claim(A, log.epoch)
        log.lose()
    assert log.is_poisoned


def test_a_reissue_is_no_loss():
    log = TokenLog(JOB)
    for _ in range(2 * MAX_BARREN_EPOCHS):
        log.reissue()
    assert not log.is_poisoned
    assert log.epoch == 1 + 2 * MAX_BARREN_EPOCHS


def test_a_handover_moves_the_job_at_its_next_token_and_fences_the_source():
    log = owned()
    log.append(A, run(0, 7))
    assert log.hand_over(A, Epoch(1), 1, B) == HandedOver(Epoch(2))
    log.check()
    assert (log.owner, log.owners, log.state) == (B, 2, LogState.OWNED)
    assert isinstance(log.append(A, run(1, 8)), Refused)
    assert isinstance(log.claim(A, Epoch(1)), Refused)
    assert isinstance(log.hand_over(A, Epoch(1), 1, A), Refused)
    assert isinstance(log.append(B, run(1, 8, epoch=2)), Appended)
    assert log.lose() == 3


@pytest.mark.parametrize(
    ("worker", "epoch", "next_index", "verdict"),
    [(A, 1, 0, Kept), (A, 1, 2, Kept), (A, 2, 1, Refused), (B, 1, 1, Refused)],
)
def test_a_handover_that_does_not_fit_changes_nothing(worker, epoch, next_index, verdict):
    log = owned()
    log.append(A, run(0, 7))
    assert isinstance(log.hand_over(worker, Epoch(epoch), next_index, B), verdict)
    assert (log.owner, log.epoch) == (A, 1)


def test_nobody_hands_over_what_waits_or_is_finished():
    assert isinstance(TokenLog(JOB).hand_over(A, Epoch(1), 0, B), Refused)
    log = owned()
    log.append(A, run(0, 7, finish=FinishReason.STOP))
    assert isinstance(log.hand_over(A, Epoch(1), 1, B), Refused)


def test_barren_owners_count_across_a_handover_without_a_token():
    log = TokenLog(JOB)
    for _ in range(MAX_BARREN_EPOCHS - 1):
        log.claim(A, log.epoch)
        log.lose()
    log.claim(A, log.epoch)
    log.hand_over(A, log.epoch, 0, B)
    log.lose()
    assert log.is_poisoned


class Interleavings(RuleBasedStateMachine):
    """Two workers hold entries of any epoch and deliver late, twice, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.log = TokenLog(JOB)
        self.entries: list[tuple[int, int]] = [(1, 0)]
        """(epoch, tokens known) of everything that was ever appended to the queue."""
        self.messages: list[tuple[WorkerId, TokenRun]] = []
        self.released: list[int] = []
        self.finishes = 0

    @rule(worker=st.sampled_from([A, B]), data=st.data())
    def claim(self, worker, data):
        epoch, known = data.draw(st.sampled_from(self.entries))
        is_current = epoch == self.log.epoch and self.log.state is LogState.WAITING
        verdict = self.log.claim(worker, Epoch(epoch))
        assert not is_current or verdict == Bound()
        self._produce(worker, epoch, known, data.draw(st.integers(1, 4)))

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data, keep):
        at = data.draw(st.integers(0, len(self.messages) - 1))
        worker, message = self.messages[at] if keep else self.messages.pop(at)
        verdict = self.log.append(worker, message)
        if isinstance(verdict, Appended):
            self.released.extend(verdict.run.token_ids)
            self.finishes += verdict.run.finish is not None
        if isinstance(verdict, Broken):
            self._lose()

    @precondition(lambda self: self.log.state is LogState.OWNED)
    @rule()
    def lose(self):
        self._lose()

    @rule(
        source=st.sampled_from([A, B]),
        known=st.integers(0, len(TRUTH)),
        back=st.integers(0, 1),
        size=st.integers(1, 4),
    )
    def hand_over(self, source, known, back, size):
        target = B if source == A else A
        epoch = self.log.epoch - back
        is_owner = self.log.owner == source and not back
        verdict = self.log.hand_over(source, Epoch(epoch), known, target)
        assert isinstance(verdict, HandedOver) == (is_owner and known == len(self.released))
        if isinstance(verdict, HandedOver):
            self._produce(target, verdict.epoch, known, size)

    @precondition(lambda self: self.log.state is LogState.WAITING)
    @rule()
    def reissue(self):
        self.entries.append((self.log.reissue(), len(self.released)))

    @invariant()
    def released_is_a_prefix_of_the_truth(self):
        assert tuple(self.released) == TRUTH[: len(self.released)]
        assert self.released == self.log.token_ids
        assert self.finishes <= 1
        assert not self.finishes or len(self.released) == len(TRUTH)
        self.log.check()

    def _lose(self):
        self.entries.append((self.log.lose(), len(self.released)))

    def _produce(self, worker, epoch, start, size):
        for index in range(start, len(TRUTH), size):
            is_last = index + size >= len(TRUTH)
            finish = FinishReason.STOP if is_last else None
            tokens = TRUTH[index : index + size]
            self.messages.append((worker, run(index, *tokens, epoch=epoch, finish=finish)))


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_an_undisturbed_run_releases_everything(size):
    log = owned()
    for index in range(0, 12, size):
        assert isinstance(log.append(A, run(index, *TRUTH[index : index + size])), Appended)
    assert tuple(log.token_ids) == TRUTH
