"""How slow an engine is: its newest steps over the best of their shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch, Chunk, Sequence
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.slowdown import MAX_SHAPES, NEWEST, WINDOW, Slowdown, shape_of
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import SubmitJob
from tests.services.worker.counting_model import CountingModel

GREEDY = SamplingParams(max_tokens=150, temperature=0.0)


def chunks(tokens: int, jobs: int = 1, start: int = 40) -> list[Chunk]:
    sequences = [Sequence(JobId(str(n)), Epoch(1), [0] * 200, 1, GREEDY) for n in range(jobs)]
    return [Chunk(each, start, tokens) for each in sequences]


def noted(slowdown: Slowdown, step_s: float, count: int, what: list[Chunk]) -> float:
    for _ in range(count):
        slowdown.note(what, step_s)
    return slowdown.ratio


def test_nothing_is_known_before_a_shape_was_looked_at():
    slowdown = Slowdown()
    assert noted(slowdown, 0.01, WINDOW - 1, chunks(1)) == 0.0
    assert noted(slowdown, 0.01, WINDOW, chunks(1)) == pytest.approx(1.0)


def test_slower_steps_are_seen_and_so_is_their_end():
    slowdown = Slowdown()
    noted(slowdown, 0.01, 3 * WINDOW, chunks(1))
    assert noted(slowdown, 0.013, NEWEST, chunks(1)) == pytest.approx(1.3)
    assert noted(slowdown, 0.01, NEWEST, chunks(1)) == pytest.approx(1.0)


def test_one_odd_step_moves_nothing_and_one_quick_step_is_no_best():
    slowdown = Slowdown()
    noted(slowdown, 0.01, 3 * WINDOW, chunks(1))
    slowdown.note(chunks(1), 9.0)
    slowdown.note(chunks(1), 0.0001)
    assert noted(slowdown, 0.01, NEWEST, chunks(1)) == pytest.approx(1.0)


def test_larger_steps_are_compared_with_their_like():
    """A step of eight takes thrice as long as one of one, which does not make the engine slow."""
    slowdown = Slowdown()
    noted(slowdown, 0.01, 3 * WINDOW, chunks(1))
    assert noted(slowdown, 0.03, 5 * NEWEST, chunks(1, jobs=8)) == pytest.approx(1.0)
    slow = noted(slowdown, 0.06, NEWEST, chunks(1, jobs=8))
    assert slow == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (chunks(1, jobs=2), chunks(2), False),  # twice the context
        (chunks(1), chunks(2), False),
        (chunks(40), chunks(43), True),
        (chunks(40), chunks(44), False),
        (chunks(60), chunks(70), False),
        (chunks(1, start=1024), chunks(1, start=1151), True),
        (chunks(1, start=1024), chunks(1, start=1152), False),
        (chunks(1, start=14), chunks(1, start=15), True),
        (chunks(1, start=15), chunks(1, start=16), False),
    ],
)
def test_shapes(one, other, is_same):
    assert (shape_of(one) == shape_of(other)) is is_same


@given(st.lists(st.sampled_from([1, 2, 5, 16, 100]), min_size=1, max_size=300), st.integers(1, 40))
def test_a_machine_that_stays_as_fast_as_it_is_has_no_slowdown(sizes, speed):
    slowdown = Slowdown()
    for tokens in sizes:
        slowdown.note(chunks(tokens), tokens / speed)
    assert slowdown.ratio in (0.0, pytest.approx(1.0))


@given(st.integers(1, 10**7), st.integers(0, 10**7))
def test_steps_of_one_shape_differ_by_less_than_an_eighth(least, more):
    one, other = ([Chunk(chunks(1)[0].sequence, 0, count)] for count in (least, least + more))
    if shape_of(one) == shape_of(other):
        assert more * 8 < least


def test_a_context_that_grows_makes_no_engine_slow():
    """A quarter of a step's time is in proportion to the context at 1,024 tokens."""
    slowdown, ratios = Slowdown(), list[float]()
    for context in range(1024, 8190):
        slowdown.note(chunks(1, start=context), 0.0257 + 0.0000062 * context)
        ratios.append(slowdown.ratio)
    assert max(ratios) < 1.125


def test_of_many_shapes_the_latest_are_remembered():
    slowdown = Slowdown()
    noted(slowdown, 0.01, WINDOW, chunks(1))
    for number in range(MAX_SHAPES):
        slowdown.note(chunks(1 + number % 16, start=64 * 2 ** (number // 16)), 0.01)
    ratio = slowdown.ratio
    assert noted(slowdown, 0.05, WINDOW - 1, chunks(1)) == ratio
    assert len(slowdown._seen) == MAX_SHAPES


class DriftingModel(CountingModel):
    """Takes `step_s`, on a clock of its own."""

    now_s, step_s = 0.0, 1.0

    def forward(self, step):
        self.now_s += self.step_s
        return super().forward(step)


def test_an_engine_says_how_slow_it_is():
    model = DriftingModel(16)
    engine = Engine(
        model,
        Batch(KvBlocks(16), slots=1, step_tokens=32),
        context_tokens=200,
        clock=lambda: model.now_s,
    )

    def after_jobs(count: int) -> float:
        """Each is short: what its steps take was seen with the jobs before."""
        sampling = SamplingParams(max_tokens=25, temperature=0.0)
        for number in range(count):
            name = JobId(f"{model.now_s} {number}")
            engine.submit(SubmitJob(name, Epoch(1), (1, 2, 3), (), sampling))
        said = [engine.step().slowdown for _ in range(25 * count)]
        return said[-1]

    assert engine.report().slowdown == 0.0
    assert after_jobs(4) == pytest.approx(1.0)
    model.step_s = 1.5
    assert after_jobs(4) == pytest.approx(1.5)
