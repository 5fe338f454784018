"""The time of an engine's steps: every second of them is some job's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch, Chunk, Sequence
from services.worker.engine.batching.device_time import DeviceTime
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import CancelJob, SubmitJob
from tests.services.worker.counting_model import VOCABULARY, CountingModel


class SlowModel(CountingModel):
    """Takes a second a step and a hundredth a token, on a clock of its own."""

    now_s = 100.0

    def forward(self, step):
        self.now_s += 1.0 + 0.01 * len(step.token_ids)
        return super().forward(step)


def slow_engine(**batch: int) -> tuple[Engine, SlowModel]:
    model = SlowModel(16)
    shape = {"slots": 4, "step_tokens": 32} | batch
    engine = Engine(
        model, Batch(KvBlocks(16), **shape), context_tokens=200, clock=lambda: model.now_s
    )
    return engine, model


def job(name: str, prompt: int, max_tokens: int) -> SubmitJob:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return SubmitJob(JobId(name), Epoch(1), tuple(range(1, prompt + 1)), (), sampling)


def chunk(name: str, count: int) -> Chunk:
    sequence = Sequence(
        JobId(name), Epoch(1), [0] * count, count, SamplingParams(max_tokens=1, temperature=0.0)
    )
    return Chunk(sequence, 0, count)


def test_a_step_is_divided_by_the_tokens_it_computed():
    books = DeviceTime(lambda _: True)
    books.divide([chunk("a", 3), chunk("b", 1)], 4.0)
    books.divide([chunk("b", 1)], 0.5)
    assert books.take((JobId("a"), Epoch(1))) == pytest.approx(3.0)
    assert books.take((JobId("b"), Epoch(1))) == pytest.approx(1.5)
    assert books.take((JobId("b"), Epoch(1))) == 0.0
    assert books.busy_s == pytest.approx(4.5)
    books.check()


def test_the_rest_of_a_step_goes_to_the_next():
    books = DeviceTime(lambda _: True)
    books.divide([chunk("a", 1)], 1.0)
    books.add_rest(0.5)
    assert books.take((JobId("a"), Epoch(1))) == 1.0
    books.divide([chunk("b", 1)], 1.0)
    assert books.take((JobId("b"), Epoch(1))) == 1.5
    assert books.busy_s == 2.5
    books.check()


def test_jobs_that_are_gone_do_not_pile_up():
    books = DeviceTime(lambda _: False)
    for number in range(1000):
        books.divide([chunk(str(number), 1)], 1.0)
    assert len(books._owed) < 100
    assert books.dropped_s > 900
    books.check()


@given(
    jobs=st.lists(
        st.tuples(st.integers(1, VOCABULARY - 1), st.integers(1, 12), st.integers(0, 4)),
        min_size=1,
        max_size=8,
    ),
    cancelled=st.sets(st.integers(0, 7)),
)
def test_the_sum_over_jobs_is_the_busy_time(jobs, cancelled):
    engine, model = slow_engine()
    told: dict[str, float] = {}

    def step() -> None:
        for run in engine.step().runs:
            told[run.job_id] = told.get(run.job_id, 0.0) + run.device_s
        engine.check()

    for number, (prompt, max_tokens, pause) in enumerate(jobs):
        engine.submit(job(str(number), prompt, max_tokens))
        for _ in range(pause):
            step()
        if number in cancelled:
            engine.cancel(CancelJob(JobId(str(number)), Epoch(1)))
    while not engine.is_idle:
        step()
    busy_s = model.now_s - 100.0
    assert engine.device_time.busy_s == pytest.approx(busy_s)
    assert sum(told.values()) <= busy_s + 1e-6
    if not cancelled:
        assert sum(told.values()) == pytest.approx(busy_s)
        assert all(seconds > 0 for seconds in told.values())


def test_a_prompt_in_pieces_is_told_with_the_first_token():
    engine, model = slow_engine(step_tokens=10)
    engine.submit(job("a", 25, 1))
    runs = [run for _ in range(3) for run in engine.step().runs]
    (only,) = runs
    assert only.finish is FinishReason.LENGTH
    assert only.device_s == pytest.approx(model.now_s - 100.0) == pytest.approx(3.25)
