"""Held jobs computed beside the steps: same tokens, no step longer for them, no block let go of
while it is written to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.held_share import FIRST_TOKENS
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.beside import CHUNK_TOKENS
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import CancelJob, FeedJob, HoldJob, JobPhase, ReleaseJob
from tests.services.worker.counting_model import CountingModel, answer
from tests.services.worker.engine.batching.test_migrating_jobs import JOB, NEW, Host, draft_of, job


class LatePass:
    """A side pass whose steps are computed when they were asked after often enough."""

    def __init__(self, model, asks=1, token_asks=0):
        self.model = model
        self.asks, self.token_asks = asks, token_asks
        self.fault = None
        self.begun = []
        self.touched = []
        self._step, self._left = None, 0

    def begin(self, step):
        assert self._step is None
        self.begun.append(step)
        self._step, self._left = step, self.asks + self.token_asks * len(step.token_ids)

    def touch(self, blocks):
        self.touched.append(blocks)

    def wait(self, timeout_s):
        if self.fault:
            raise self.fault
        self._left -= 1
        if self._left > 0:
            return None
        steps = len(self.model.steps)
        self.model.forward(self._step)
        del self.model.steps[steps:]
        self._step = None
        return 0.5

    def close(self):
        """It has no thread."""


class BesideHost(Host):
    """A host with a side pass, on a clock that goes on by a millisecond each time it is read."""

    def __init__(self, *, asks=1, token_asks=0, total_blocks=48, has_pass=True):
        super().__init__()
        self.model = CountingModel(total_blocks)
        self.blocks = KvBlocks(total_blocks)
        self.now_s = 0.0
        self.batch = Batch(self.blocks, slots=4, step_tokens=32)
        self.engine = Engine(self.model, self.batch, context_tokens=400, clock=self.tick)
        self.late = LatePass(self.model, asks, token_asks)
        if has_pass:
            self.engine.beside.use(self.late)

    def tick(self):
        self.now_s += 0.001
        return self.now_s

    def neighbour(self, max_tokens=200):
        self.engine.submit(job([9] * 9, max_tokens, name="other"))
        self.step()

    def tokens_in_steps(self):
        """How many tokens the steps since the last call had."""
        steps = [len(step.token_ids) for step in self.model.steps]
        self.model.steps.clear()
        return steps


@given(
    prompt_tokens=st.integers(1, 150),
    max_tokens=st.integers(1, 40),
    asks=st.integers(1, 9),
    neighbour_tokens=st.sampled_from((0, 8, 200)),
    feeds=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=4),
    steps=st.integers(0, 40),
    draft_tokens=st.sampled_from((0, 25, 40)),
    right_tokens=st.integers(0, 40),
)
def test_a_job_that_came_beside_the_steps_says_what_it_would_have_said(
    prompt_tokens, max_tokens, asks, neighbour_tokens, feeds, steps, draft_tokens, right_tokens
):
    host = BesideHost(asks=asks)
    if neighbour_tokens:
        host.neighbour(neighbour_tokens)
    prompt = [place * 5 % 31 for place in range(prompt_tokens)]
    whole, said = answer(prompt, max_tokens), 0
    draft = draft_of(prompt, draft_tokens, right_tokens)
    host.ask(HoldJob(job(prompt, max_tokens, epoch=NEW, draft_token_ids=draft)))
    for pause, count in feeds:
        for _ in range(pause):
            host.step()
        said = min(said + count, max_tokens)
        host.ask(FeedJob(JOB, NEW, 0, tuple(whole[:said])))
    for _ in range(steps):
        host.step()
    host.engine.migrate(ReleaseJob(JOB, NEW))
    host.run_out()
    assert whole[:said] + host.tokens[JOB] == whole
    if neighbour_tokens:
        assert host.tokens["other"] == answer([9] * 9, neighbour_tokens)
    assert host.blocks.free_blocks == host.blocks.total_blocks


@pytest.mark.parametrize("has_pass", [True, False])
def test_no_step_of_a_neighbour_has_tokens_of_a_job_that_is_computed_beside(has_pass):
    host = BesideHost(asks=3, has_pass=has_pass)
    host.neighbour()
    host.tokens_in_steps()
    prompt = [3] * 150
    report = host.ask(HoldJob(job(prompt, 5, epoch=NEW)))
    while report is None or report.computed_tokens < len(prompt) - 1:
        report = host.step().get(JOB)
    steps = host.tokens_in_steps()
    assert (set(steps) == {1}) is has_pass
    assert [len(step.token_ids) for step in host.late.begun] == (
        [FIRST_TOKENS, CHUNK_TOKENS, CHUNK_TOKENS, 17] if has_pass else []
    )


@pytest.mark.parametrize("has_pass", [True, False])
def test_the_blocks_of_a_job_that_comes_by_kv_are_touched_beside_the_steps(has_pass):
    host = BesideHost(has_pass=has_pass)
    host.ask(HoldJob(job([3] * 20, 5, epoch=NEW, name="by tokens")))
    report = host.ask(HoldJob(job([3] * 100, 5, epoch=NEW), by_kv=True, reserve_tokens=40))
    assert len(report.block_table) == 9
    assert host.late.touched == ([report.block_table] if has_pass else [])


def test_what_is_computed_beside_is_the_job_s_time():
    host = BesideHost()
    host.neighbour()
    host.ask(HoldJob(job([3] * 100, 1, epoch=NEW)))
    for _ in range(5):
        host.step()
    busy_s = host.engine.device_time.busy_s
    assert len(host.late.begun) == 3
    assert busy_s == pytest.approx(3 * 0.5, abs=0.2)
    assert host.engine.device_time.take((JOB, NEW)) == pytest.approx(3 * 0.5)
    host.engine.check()


def test_with_nobody_to_wait_a_held_job_is_computed_in_steps_by_all_threads():
    host = BesideHost()
    host.ask(HoldJob(job([3] * 100, 5, epoch=NEW)))
    host.run_out()
    assert not host.late.begun
    assert sum(host.tokens_in_steps()) == 99


def test_a_job_with_no_time_left_is_computed_in_steps():
    host = BesideHost()
    host.neighbour()
    host.ask(HoldJob(job([3] * 150, 5, epoch=NEW), patience_s=1e-9))
    for _ in range(6):
        host.step()
    assert not host.late.begun
    assert min(host.tokens_in_steps()) > 1


def test_a_job_whose_passes_are_slow_is_whole_in_time_with_the_steps_help():
    host = BesideHost(token_asks=10)
    host.neighbour()
    host.engine.migrate(HoldJob(job([3] * 60, 5, epoch=NEW), patience_s=1.0))
    host.step()
    held = host.batch.find((JOB, NEW))
    assert held is not None
    while held.computed < 59 and host.now_s <= held.whole_by_s:
        host.step()
    assert held.computed == 59
    assert host.late.begun
    assert max(host.tokens_in_steps()) > 1


def test_of_two_held_jobs_the_one_that_is_due_first_comes_first_and_the_other_waits():
    host = BesideHost(asks=2)
    host.neighbour()
    host.tokens_in_steps()
    host.engine.migrate(HoldJob(job([3] * 140, 5, epoch=NEW, name="late"), patience_s=30.0))
    host.engine.migrate(HoldJob(job([4] * 140, 5, epoch=NEW, name="soon"), patience_s=20.0))
    for _ in range(30):
        host.step()
    assert [step.token_ids[0] for step in host.late.begun] == [4, 4, 4, 4, 3, 3, 3]
    assert set(host.tokens_in_steps()) == {1}


def test_a_dropped_job_keeps_its_blocks_until_nobody_writes_to_them():
    host = BesideHost(asks=5)
    host.neighbour()
    before = host.blocks.free_blocks
    host.engine.migrate(HoldJob(job([3] * 100, 5, epoch=NEW)))
    host.step()
    written = set(host.blocks.table((JOB, NEW)))
    host.engine.cancel(CancelJob(JOB, NEW))
    host.engine.submit(job([7] * 100, 3, name="next"))
    host.step()
    assert host.engine.beside.is_busy
    assert len(written) == 7
    assert not written & set(host.blocks.table((JobId("next"), Epoch(1))))
    host.run_out()
    assert host.blocks.free_blocks == host.blocks.total_blocks > before
    assert host.tokens["next"] == answer([7] * 100, 3)


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_job_that_has_ended_keeps_its_blocks_until_nobody_writes_to_them(is_whole):
    host = BesideHost(asks=12, total_blocks=26)
    host.neighbour(100)
    prompt = [place * 5 % 31 for place in range(100)]
    host.ask(HoldJob(job(prompt, 3, epoch=NEW)))
    if is_whole:
        host.ask(FeedJob(JOB, NEW, 0, tuple(answer(prompt, 3))))
        host.engine.migrate(ReleaseJob(JOB, NEW))
    else:
        host.engine.cancel(CancelJob(JOB, NEW))
    assert host.batch.find((JOB, NEW)) is None
    host.engine.cancel(CancelJob(JOB, NEW))
    assert host.engine.beside.is_busy
    assert len(host.blocks.table((JOB, NEW))) == 7
    third = [place * 7 % 29 for place in range(70)]
    host.engine.submit(job(third, 20, name="third"))
    host.run_out()
    assert host.tokens["third"] == answer(third, 20)
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_blocks_are_given_back_though_nothing_else_runs():
    host = BesideHost(asks=5)
    host.neighbour()
    host.engine.migrate(HoldJob(job([3] * 100, 5, epoch=NEW)))
    host.step()
    host.engine.cancel(CancelJob(JOB, NEW))
    host.engine.cancel(CancelJob(JobId("other"), Epoch(1)))
    assert not host.engine.is_idle
    host.run_out()
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_a_job_that_is_released_meanwhile_makes_nobody_wait():
    host = BesideHost(asks=6)
    host.neighbour()
    prompt = [3] * 60
    host.ask(HoldJob(job(prompt, 5, epoch=NEW)))
    host.engine.migrate(ReleaseJob(JOB, NEW))
    said = len(host.tokens["other"])
    while JOB not in host.tokens:
        host.step()
    assert len(host.tokens["other"]) - said >= 3, "the other one went on"
    host.run_out()
    assert host.tokens[JOB] == answer(prompt, 5)
    assert host.tokens["other"] == answer([9] * 9, 200)
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_no_step_guesses_of_a_job_that_is_still_computed_beside():
    host = BesideHost(asks=6)
    host.neighbour()
    prompt = [place * 5 % 31 for place in range(20)]
    draft = draft_of(prompt, 40, 40)
    host.ask(HoldJob(job(prompt, 40, epoch=NEW, draft_token_ids=draft)))
    host.engine.migrate(ReleaseJob(JOB, NEW))
    assert host.engine.beside.is_busy
    host.run_out()
    assert host.tokens[JOB] == answer(prompt, 40)


def test_a_job_that_is_held_again_waits_for_what_is_computed_of_the_first():
    host = BesideHost(asks=5)
    host.neighbour()
    host.engine.migrate(HoldJob(job([3] * 100, 5, epoch=NEW)))
    host.step()
    host.engine.cancel(CancelJob(JOB, NEW))
    assert host.ask(HoldJob(job([5] * 90, 5, epoch=NEW))).phase is JobPhase.HELD
    host.engine.migrate(ReleaseJob(JOB, NEW))
    host.run_out()
    assert host.tokens[JOB] == answer([5] * 90, 5)
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_a_pass_that_fails_ends_the_engine_s_step():
    host = BesideHost()
    host.neighbour()
    host.ask(HoldJob(job([3] * 100, 5, epoch=NEW)))
    host.late.fault = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        host.step()
