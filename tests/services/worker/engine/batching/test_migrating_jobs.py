"""A job moves between two engines by tokens and by KV: no token lost, repeated or changed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import (
    CancelJob,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    PinJob,
    ReleaseJob,
    SubmitJob,
    ThawJob,
    UnpinJob,
)
from tests.services.worker.counting_model import VOCABULARY, CountingModel, answer

JOB = JobId("a")
OLD, NEW = Epoch(1), Epoch(2)


class Host:
    """One engine, what it said and how far its job's answer came."""

    def __init__(self, *, total_blocks=16, slots=4, step_tokens=32):
        self.model = CountingModel(total_blocks)
        self.blocks = KvBlocks(total_blocks)
        batch = Batch(self.blocks, slots=slots, step_tokens=step_tokens)
        self.engine = Engine(self.model, batch, context_tokens=200, clock=lambda: 0.0)
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}

    def step(self):
        """Step once and return the reports by job."""
        done = self.engine.step()
        self.engine.check()
        for run in done.runs:
            self.tokens.setdefault(run.job_id, []).extend(run.token_ids)
            if run.finish is not None:
                self.finished[run.job_id] = run.finish
        return {report.job_id: report for report in done.reports}

    def ask(self, message):
        """Send a message and return what the next step says about its job."""
        self.engine.migrate(message)
        job = message.job if isinstance(message, HoldJob) else message
        return self.step().get(job.job_id)

    def run_out(self):
        for _ in range(500):
            if self.engine.is_idle:
                return
            self.step()
        raise AssertionError("the engine never became idle")


def job(prompt, max_tokens, *, generated=(), epoch=OLD, name=JOB, **fields):
    return SubmitJob(
        JobId(name),
        epoch,
        tuple(prompt),
        tuple(generated),
        SamplingParams(max_tokens=max_tokens, temperature=0.0),
        **fields,
    )


def draft_of(prompt, tokens, right):
    """A draft of so many tokens, of which so many are right."""
    whole = answer(prompt, tokens)
    return tuple((token + (at >= right)) % VOCABULARY for at, token in enumerate(whole))


@given(
    prompt=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60),
    offered_at=st.integers(1, 20),
    rounds=st.lists(st.integers(0, 9), max_size=3),
    neighbours=st.integers(0, 2),
    draft_tokens=st.integers(0, 40),
    right_tokens=st.integers(0, 40),
)
def test_a_job_moves_by_tokens(prompt, offered_at, rounds, neighbours, draft_tokens, right_tokens):
    source, target = Host(), Host()
    draft = draft_of(prompt, draft_tokens, right_tokens)
    for number in range(neighbours):
        for host in (source, target):
            host.engine.submit(job([number] * 9, 20, name=f"n{number}"))
    source.engine.submit(job(prompt, 130, draft_token_ids=draft))
    while len(source.tokens.get(JOB, ())) < offered_at:
        source.step()
    offered = list(source.tokens[JOB])
    held = job(prompt, 130, generated=offered, epoch=NEW, draft_token_ids=draft)
    assert target.ask(HoldJob(held)).phase is JobPhase.HELD
    for steps in rounds:
        for _ in range(steps):
            source.step()
            target.step()
        report = target.ask(FeedJob(JOB, NEW, 0, tuple(source.tokens[JOB])))
        assert report.next_index == len(source.tokens[JOB])
    frozen = source.ask(FreezeJob(JOB, OLD))
    assert frozen.phase is JobPhase.FROZEN
    moved = list(source.tokens[JOB])
    assert frozen.next_index == len(moved)
    source.run_out()
    assert source.tokens[JOB] == moved
    fed = target.ask(FeedJob(JOB, NEW, len(offered), tuple(moved[len(offered) :])))
    assert fed.next_index == len(moved)
    assert JOB not in target.tokens
    target.engine.migrate(ReleaseJob(JOB, NEW))
    target.run_out()
    source.engine.cancel(CancelJob(JOB, OLD))
    source.run_out()
    assert moved + target.tokens[JOB] == answer(prompt, 130)
    for host in (source, target):
        assert host.blocks.free_blocks == host.blocks.total_blocks


@given(
    prompt_tokens=st.integers(1, 70),
    before=st.integers(1, 30),
    during=st.integers(0, 30),
    draft_tokens=st.sampled_from((0, 25, 40)),
    right_tokens=st.integers(0, 40),
)
def test_a_job_moves_by_kv(prompt_tokens, before, during, draft_tokens, right_tokens):
    """Full blocks go while it runs, the last after the freeze; the target computes one token."""
    prompt = [place * 7 % VOCABULARY for place in range(prompt_tokens)]
    source, target = Host(), Host()
    draft = draft_of(prompt, draft_tokens, right_tokens)
    source.engine.submit(job(prompt, 120, draft_token_ids=draft))
    while len(source.tokens.get(JOB, ())) < before:
        source.step()
    pinned = source.ask(PinJob(JOB, OLD))
    held = job(prompt, 120, generated=source.tokens[JOB], epoch=NEW, draft_token_ids=draft)
    into = target.ask(HoldJob(held, by_kv=True, reserve_tokens=90))
    full = pinned.computed_tokens // BLOCK_TOKENS
    copy_blocks(source, pinned, target, into, range(full))
    for _ in range(during):
        source.step()
    frozen = source.ask(FreezeJob(JOB, OLD))
    copy_blocks(source, frozen, target, into, range(full, len(frozen.block_table)))
    fed = target.ask(
        FeedJob(JOB, NEW, 0, tuple(source.tokens[JOB]), kv_tokens=frozen.computed_tokens)
    )
    assert fed.computed_tokens == frozen.computed_tokens == prompt_tokens + frozen.next_index - 1
    assert not target.model.steps
    target.engine.migrate(ReleaseJob(JOB, NEW))
    target.run_out()
    assert source.tokens[JOB] + target.tokens[JOB] == answer(prompt, 120)
    assert draft or all(len(step.token_ids) == 1 for step in target.model.steps)


def copy_blocks(source, from_report, target, into_report, places):
    for place in places:
        block = source.model.cache[from_report.block_table[place]]
        target.model.cache[into_report.block_table[place]] = block


def test_a_thawed_job_goes_on_as_if_nothing_had_been():
    host = Host()
    host.engine.submit(job([3, 1], 30))
    host.step()
    assert host.ask(FreezeJob(JOB, OLD)).phase is JobPhase.FROZEN
    assert host.engine.is_idle
    assert host.ask(ThawJob(JOB, OLD)).phase is JobPhase.RUNNING
    host.engine.migrate(UnpinJob(JOB, OLD))
    host.run_out()
    assert host.tokens[JOB] == answer([3, 1], 30)
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_a_pinned_job_is_reported_block_by_block_and_outlives_its_end():
    host = Host()
    host.engine.submit(job([1] * 10, 30))
    host.step()
    assert host.ask(PinJob(JOB, OLD)).computed_tokens == 11
    seen = []
    while JOB not in host.finished:
        reports = host.step()
        seen += [reports[JOB].computed_tokens] if JOB in reports else []
    assert seen == [16, 32]
    assert host.blocks.free_blocks == host.blocks.total_blocks - 3
    ended = host.ask(PinJob(JOB, OLD))
    assert (ended.phase, len(ended.block_table)) == (JobPhase.ENDED, 3)
    host.engine.migrate(UnpinJob(JOB, OLD))
    assert host.blocks.free_blocks == host.blocks.total_blocks
    assert host.ask(PinJob(JOB, OLD)).phase is JobPhase.GONE


def test_a_job_that_comes_again_lets_go_of_the_blocks_that_it_left():
    host = Host()
    for _ in range(2):
        host.tokens.clear()
        host.engine.submit(job([1] * 10, 30))
        host.engine.migrate(PinJob(JOB, OLD))
        host.run_out()
        assert host.tokens[JOB] == answer([1] * 10, 30)
    host.engine.migrate(UnpinJob(JOB, OLD))
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_a_pinned_job_is_not_preempted():
    """The pinned one is the youngest, so that it would have to give way."""
    host = Host(total_blocks=6)
    host.engine.submit(job([2] * 20, 60, name="other"))
    host.step()
    host.engine.submit(job([1] * 20, 60))
    host.step()
    table = host.ask(PinJob(JOB, OLD)).block_table
    while JOB not in host.finished:
        host.step()
        assert list(table) == host.blocks.table((JOB, OLD))[: len(table)]
    host.engine.migrate(UnpinJob(JOB, OLD))
    host.run_out()
    assert host.tokens == {JOB: answer([1] * 20, 60), "other": answer([2] * 20, 60)}


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (job([], 5), "no token"),
        (job([VOCABULARY], 5), "outside the vocabulary"),
        (job([1] * 100, 5, generated=[1] * 120), "more than 200"),
        (job([6] * 150, 5), "blocks of KV cache are not free"),
    ],
)
def test_a_hold_that_cannot_be_taken_is_refused_with_its_reason(held, reason):
    host = Host()
    host.engine.submit(job([1] * 100, 50, name="other"))
    host.step()
    report = host.ask(HoldJob(held))
    assert report.phase is JobPhase.REFUSED
    assert reason in report.error
    host.run_out()
    assert host.tokens == {"other": answer([1] * 100, 50)}
    assert host.ask(FeedJob(JOB, OLD, 0, (1,))).phase is JobPhase.GONE


def test_a_hold_without_a_slot_is_refused():
    host = Host(slots=1)
    host.engine.submit(job([1], 5, name="other"))
    host.step()
    report = host.ask(HoldJob(job([2], 5)))
    assert (report.phase, report.error) == (JobPhase.REFUSED, "all slots are taken")


@pytest.mark.parametrize(
    ("feed", "reason"),
    [
        (FeedJob(JOB, NEW, 3, (1,)), "leave a gap behind 2"),
        (FeedJob(JOB, NEW, 0, (9, 9)), "differ"),
        (FeedJob(JOB, NEW, 2, (VOCABULARY,)), "outside the vocabulary"),
        (FeedJob(JOB, NEW, 2, (1,) * 199), "more than 200"),
        (FeedJob(JOB, NEW, 2, (1,) * 90), "no blocks of KV cache are free for 90"),
    ],
)
def test_a_refused_feed_leaves_the_job_as_it_was(feed, reason):
    host = Host(total_blocks=16)
    host.engine.migrate(HoldJob(job([1] * 180, 5, name="big", epoch=NEW)))
    prompt = [4, 4]
    log = answer(prompt, 8)
    assert host.ask(HoldJob(job(prompt, 8, generated=log[:2], epoch=NEW))).next_index == 2
    report = host.ask(feed)
    assert report.phase is JobPhase.REFUSED
    assert reason in report.error
    assert report.next_index == 2
    host.engine.cancel(CancelJob(JobId("big"), NEW))
    host.engine.migrate(FeedJob(JOB, NEW, 1, tuple(log[1:5])))
    host.engine.migrate(ReleaseJob(JOB, NEW))
    host.run_out()
    assert host.tokens[JOB] == log[5:]


def test_feeding_takes_blocks_from_those_that_came_later():
    host = Host(total_blocks=6)
    host.engine.migrate(HoldJob(job([1] * 30, 60, epoch=NEW)))
    host.engine.submit(job([2] * 40, 50, name="other"))
    host.step()
    log = answer([1] * 30, 60)
    assert host.ask(FeedJob(JOB, NEW, 0, tuple(log[:40]))).phase is JobPhase.HELD
    host.run_out()
    assert not host.tokens, "nothing should fit beside the held job"
    host.engine.migrate(ReleaseJob(JOB, NEW))
    host.run_out()
    assert host.tokens == {JOB: log[40:], "other": answer([2] * 40, 50)}


def test_a_held_job_never_samples_and_a_whole_one_ends_when_released():
    host = Host()
    log = answer([5], 3)
    host.engine.migrate(HoldJob(job([5], 3, generated=log, epoch=NEW)))
    host.run_out()
    assert not host.tokens
    assert host.engine.is_idle
    host.engine.migrate(ReleaseJob(JOB, NEW))
    host.run_out()
    assert host.finished == {JOB: FinishReason.LENGTH}
    assert host.tokens == {JOB: []}


@pytest.mark.parametrize("by_kv", [False, True])
def test_cancel_drops_a_held_job(by_kv):
    host = Host()
    host.engine.migrate(HoldJob(job([5] * 40, 9, epoch=NEW), by_kv=by_kv, reserve_tokens=30))
    host.step()
    host.engine.cancel(CancelJob(JOB, NEW))
    assert host.engine.is_idle
    assert host.blocks.free_blocks == host.blocks.total_blocks


def test_a_job_that_waits_can_be_pinned_and_frozen():
    host = Host(slots=1)
    host.engine.submit(job([1], 5, name="other"))
    host.engine.submit(job([2], 5))
    host.step()
    assert host.ask(PinJob(JOB, OLD)).phase is JobPhase.WAITING
    assert host.ask(FreezeJob(JOB, OLD)).phase is JobPhase.FROZEN
    host.run_out()
    assert set(host.finished) == {"other"}
    host.engine.migrate(ThawJob(JOB, OLD))
    host.engine.migrate(UnpinJob(JOB, OLD))
    host.run_out()
    assert host.tokens[JOB] == answer([2], 5)


def test_unknown_jobs_are_gone():
    host = Host()
    for message in (
        ReleaseJob(JOB, OLD),
        PinJob(JOB, OLD),
        FreezeJob(JOB, OLD),
        ThawJob(JOB, OLD),
        FeedJob(JOB, OLD, 0),
    ):
        report = host.ask(message)
        assert (report.phase, report.block_table) == (JobPhase.GONE, ())


class Clocked(CountingModel):
    """A step takes 10 ms, 10 ms more for each row that decodes and 1 ms for any other token."""

    def __init__(self, total_blocks):
        super().__init__(total_blocks)
        self.now_s = 0.0

    def forward(self, step):
        _, counts = np.unique(step.seq_index, return_counts=True)
        rows = sum(counts == 1)
        self.now_s += 0.010 + 0.010 * rows + 0.001 * (len(step.token_ids) - rows)
        return super().forward(step)


def test_those_who_decode_hardly_notice_a_held_jobs_prefill_and_others_prompts_as_ever():
    model = Clocked(64)
    batch = Batch(KvBlocks(64), slots=4, step_tokens=64)
    engine = Engine(model, batch, context_tokens=400, clock=lambda: model.now_s)
    for number in range(2):
        engine.submit(job([number + 1] * 20, 200, name=f"other{number}"))
    for _ in range(6):
        engine.step()
    decode_s = engine.step().step_s
    engine.migrate(HoldJob(job([9] * 150, 20, epoch=NEW)))
    steps = [engine.step() for _ in range(8)]
    times_s = [step.step_s for step in steps]
    assert max(times_s) <= 1.16 * decode_s
    assert all(len(step.runs) == 2 for step in steps)
    held = batch.find((JOB, NEW))
    assert held is not None
    while held.wanted:
        times_s.append(engine.step().step_s)
    assert max(times_s) <= 1.16 * decode_s
    engine.submit(job([8] * 60, 5, name="new"))
    assert engine.step().step_s > 2 * decode_s


@pytest.mark.parametrize("patience_s", [0.0, 0.1])
def test_a_held_job_with_little_time_takes_the_step_it_needs(patience_s):
    model = Clocked(64)
    batch = Batch(KvBlocks(64), slots=4, step_tokens=256)
    engine = Engine(model, batch, context_tokens=400, clock=lambda: model.now_s)
    engine.submit(job([1] * 20, 200, name="other"))
    for _ in range(6):
        engine.step()
    engine.migrate(HoldJob(job([9] * 200, 20, epoch=NEW), patience_s=patience_s))
    engine.step()
    held = batch.find((JOB, NEW))
    assert held is not None
    assert held.computed == (2 if patience_s == 0 else 40)
