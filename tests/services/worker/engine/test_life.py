"""Jobs come, move, freeze and go in any order: every answer is whole and no block is left."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
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

BLOCKS = 10
EPOCH = Epoch(1)


class Life(RuleBasedStateMachine):
    """The worker's side: what it asked for, and the tokens that it must get."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        blocks = KvBlocks(BLOCKS)
        batch = Batch(blocks, slots=3, step_tokens=24)
        self.blocks = blocks
        self.engine = Engine(
            CountingModel(BLOCKS), batch, context_tokens=110, clock=lambda: self.now_s
        )
        self.count = 0
        self.wanted: dict[str, list[int]] = {}
        """What each job still has to say."""
        self.held: dict[str, list[int]] = {}
        """Answers of held jobs, of which the engine knows the first `fed`."""
        self.fed: dict[str, int] = {}
        self.touched: set[str] = set()
        """Jobs that may be pinned or frozen."""

    def job(self, prompt, tokens, known, priority):
        self.count += 1
        name = str(self.count)
        whole = answer(prompt, tokens)
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
        log = tuple(whole[:known])
        return name, whole, SubmitJob(
            JobId(name), EPOCH, tuple(prompt), log, sampling, priority=priority
        )  # fmt: skip

    prompts = st.builds(
        lambda length, token: [token] * length, st.integers(1, 60), st.integers(0, VOCABULARY - 1)
    )

    @rule(prompt=prompts, tokens=st.integers(1, 40), priority=st.sampled_from(Priority))
    def submit(self, prompt, tokens, priority):
        name, whole, job = self.job(prompt, tokens, 0, priority)
        self.engine.submit(job)
        self.wanted[name] = whole

    @rule(prompt=prompts, tokens=st.integers(4, 40), reserve=st.integers(0, 50))
    def hold(self, prompt, tokens, reserve):
        name, whole, job = self.job(prompt, tokens, 2, Priority.INTERACTIVE)
        self.engine.migrate(HoldJob(job, reserve_tokens=reserve))
        if any(report.phase is JobPhase.HELD for report in self.step(name)):
            self.held[name], self.fed[name] = whole, 2

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(0, 12))
    def feed(self, data, more):
        name = data.draw(st.sampled_from(sorted(self.held)))
        end = min(len(self.held[name]) - 1, self.fed[name] + more)
        fed = tuple(self.held[name][1:end])
        self.engine.migrate(FeedJob(JobId(name), EPOCH, 1, fed))
        (report,) = self.step(name)
        if report.phase is JobPhase.HELD:
            self.fed[name] = max(self.fed[name], 1 + len(fed))
        assert report.next_index == self.fed[name]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.engine.migrate(ReleaseJob(JobId(name), EPOCH))
        self.wanted[name] = self.held.pop(name)[self.fed[name] :]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data(), kind=st.sampled_from([PinJob, UnpinJob, FreezeJob, ThawJob]))
    def touch(self, data, kind):
        name = data.draw(st.sampled_from(sorted(self.wanted)))
        self.engine.migrate(kind(JobId(name), EPOCH))
        self.touched.add(name)

    @rule(data=st.data())
    def cancel(self, data):
        known = sorted({*self.wanted, *self.held, *self.touched})
        if known:
            name = data.draw(st.sampled_from(known))
            self.engine.cancel(CancelJob(JobId(name), EPOCH))
            self.touched.discard(name)
            for jobs in (self.wanted, self.held):
                jobs.pop(name, None)

    @rule(seconds=st.sampled_from([0.01, 1.0, 70.0]), steps=st.integers(1, 8))
    def run(self, seconds, steps):
        for _ in range(steps):
            self.now_s += seconds
            self.step("")

    def step(self, name):
        """Step, take the tokens, and return what was reported about one job."""
        done = self.engine.step()
        for run in done.runs:
            left = self.wanted[run.job_id]
            assert list(run.token_ids) == left[: len(run.token_ids)]
            del left[: len(run.token_ids)]
            if run.finish is not None:
                assert not left
                del self.wanted[run.job_id]
        return [report for report in done.reports if report.job_id == name]

    @invariant()
    def holds(self):
        self.engine.check()

    def teardown(self):
        for name in sorted(self.touched):
            self.engine.migrate(ThawJob(JobId(name), EPOCH))
            self.engine.migrate(UnpinJob(JobId(name), EPOCH))
        for name in sorted(self.held):
            self.engine.cancel(CancelJob(JobId(name), EPOCH))
        for _ in range(3000):
            if self.engine.is_idle:
                break
            self.now_s += 0.5
            self.step("")
        assert self.engine.is_idle
        assert not self.wanted, "jobs that never ended"
        assert self.blocks.free_blocks == BLOCKS


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=80, stateful_step_count=30)
