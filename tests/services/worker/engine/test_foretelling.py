"""Jobs that wait ride in the first pass: their tokens are right, early, and nobody's before."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.generation.canary import Canary, CanaryToken
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine.starting.first_pass import run_first_pass
from services.worker.engine_link.messages import SubmitJob
from tests.services.worker.counting_model import VOCABULARY, CountingModel, answer

STEP_TOKENS = 32
PROMPT = (1, 5)
CANARY = Canary(PROMPT, tuple(CanaryToken(t, 0.0, 1.0, 1e6) for t in answer(PROMPT, 4)))
WRONG = Canary(PROMPT, tuple(CanaryToken(t, 0.0, 1e7, 1e6) for t in (0, 0, 0, 0)))


class Site:
    """An engine about to make its first pass."""

    def __init__(self, total_blocks=16, slots=4):
        self.blocks = KvBlocks(total_blocks)
        self.batch = Batch(self.blocks, slots=slots, step_tokens=STEP_TOKENS)
        self.model = CountingModel(total_blocks)
        self.engine = Engine(self.model, self.batch, context_tokens=110, clock=lambda: 0.0)

    def start(self, *jobs, canary=CANARY):
        run_first_pass(self.model, canary, self.blocks, self.engine.foretelling, jobs)

    def run_out(self):
        """Step until idle; return each job's tokens and its first run."""
        found: dict[str, Any] = {}
        for _ in range(500):
            if self.engine.is_idle:
                return found
            for run in self.engine.step().runs:
                tokens, first = found.get(run.job_id, ([], run))
                assert run.index == len(tokens)
                found[run.job_id] = (tokens + list(run.token_ids), first)
            self.engine.check()
        raise AssertionError("the engine never became idle")


@pytest.fixture
def site():
    return Site()


def job(name, prompt, max_tokens=6, *, epoch=1, generated=(), adapter="", tenant="t"):
    return SubmitJob(
        JobId(name),
        Epoch(epoch),
        tuple(prompt),
        tuple(generated),
        SamplingParams(max_tokens=max_tokens, temperature=0.0),
        tenant=tenant,
        adapter=adapter,
    )


def test_a_foretold_token_is_out_before_another_step_is_computed(site):
    waiting = job("a", [3, 1, 4])
    site.start(waiting)
    assert len(site.model.steps) == 1
    assert site.engine.is_idle
    assert not site.engine.has_reports
    site.engine.submit(waiting)
    assert site.engine.has_reports
    (run,) = site.engine.report().runs
    assert (run.index, list(run.token_ids)) == (0, answer([3, 1, 4], 1))
    assert len(site.model.steps) == 1
    assert not site.engine.has_reports
    tokens = [token for run in _runs(site) for token in run.token_ids]
    assert [*run.token_ids, *tokens] == answer([3, 1, 4], 6)


def _runs(site):
    while not site.engine.is_idle:
        yield from site.engine.step().runs


def test_nothing_is_held_for_a_job_that_goes_elsewhere(site):
    site.start(job("a", [3] * 20))
    assert (site.batch.running, site.batch.waiting) == (0, 0)
    assert site.blocks.free_blocks == site.blocks.total_blocks
    site.engine.check()


def test_a_job_that_ends_with_its_first_token_needs_no_step(site):
    site.start(job("a", [3, 1, 4], 1))
    site.engine.submit(job("a", [3, 1, 4], 1))
    (run,) = site.engine.report().runs
    assert (list(run.token_ids), run.finish) == (answer([3, 1, 4], 1), FinishReason.LENGTH)
    assert site.engine.is_idle
    assert len(site.model.steps) == 1


def test_a_resumed_job_goes_on_behind_its_log(site):
    whole = answer([3, 1, 4], 6)
    resumed = job("a", [3, 1, 4], generated=whole[:2])
    site.start(resumed)
    site.engine.submit(resumed)
    (run,) = site.engine.report().runs
    assert (run.index, list(run.token_ids)) == (2, whole[2:3])


@pytest.mark.parametrize(
    "other",
    [job("a", [3, 1, 4], epoch=2), job("b", [3, 1, 4]), job("a", [3, 1, 5])],
    ids=["epoch", "job", "prompt"],
)
def test_another_submission_gets_nothing_of_it(site, other):
    site.start(job("a", [3, 1, 4]))
    site.engine.submit(other)
    assert not site.engine.has_reports
    found = site.run_out()
    assert found[other.job_id][0] == answer(other.prompt_token_ids, 6)


def test_a_token_is_given_once(site):
    waiting = job("a", [3, 1, 4], 1)
    site.start(waiting)
    site.engine.submit(waiting)
    assert len(site.engine.report().runs) == 1
    site.engine.submit(waiting)
    assert not site.engine.has_reports


def test_a_wrong_canary_foretells_nothing(site):
    waiting = job("a", [3, 1, 4])
    with pytest.raises(CorruptCheckpoint):
        site.start(waiting, canary=WRONG)
    site.engine.submit(waiting)
    assert not site.engine.has_reports


def test_a_job_that_is_impossible_or_wants_an_adapter_is_left_alone(site):
    strange = [
        job("a", [VOCABULARY]),
        job("b", []),
        job("c", [1], adapter="x"),
        job("d", [1] * 200),
    ]
    site.start(*strange)
    assert len(site.model.steps[0].token_ids) == len(CANARY.fed_token_ids)


def test_an_answer_that_is_not_a_number_is_foretold_to_nobody(site):
    site.model.poison = 17
    site.start(job("a", [17, 2]), job("b", [3, 2]))
    site.engine.submit(job("a", [17, 2]))
    assert not site.engine.has_reports
    (run,) = site.engine.step().runs
    assert run.finish is FinishReason.ERROR
    site.engine.submit(job("b", [3, 2]))
    assert site.engine.has_reports


def test_of_a_long_prompt_a_part_is_known_and_counts_as_computed_for_it(site):
    prompt = [place % 7 for place in range(80)]
    site.start(job("a", prompt))
    site.engine.submit(job("a", prompt))
    found = site.run_out()["a"]
    assert found[0] == answer(prompt, 6)
    assert found[1].cached_tokens == 0
    assert sum(len(step.token_ids) for step in site.model.steps[1:]) < len(prompt)


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=70)


@given(
    waiting=st.lists(st.tuples(prompts, st.integers(1, 9)), max_size=6),
    others=st.lists(st.tuples(prompts, st.integers(1, 9)), max_size=3),
    claimed=st.sets(st.integers(0, 5)),
    total_blocks=st.integers(9, 20),
    slots=st.integers(1, 5),
)
def test_every_answer_is_the_jobs_own(waiting, others, claimed, total_blocks, slots):
    """Whichever of those that wait come here, beside whom, with as little room as there may be."""
    site = Site(total_blocks, slots)
    site.start(*(job(str(n), prompt, count) for n, (prompt, count) in enumerate(waiting)))
    site.engine.check()
    computed = len(site.model.steps[0].token_ids) - len(CANARY.fed_token_ids)
    assert computed <= STEP_TOKENS
    wanted = {}
    for number, (prompt, count) in enumerate(others):
        name = f"other-{number}"
        site.engine.submit(job(name, prompt, count, tenant="u"))
        wanted[name] = answer(prompt, count)
    for number, (prompt, count) in enumerate(waiting):
        if number in claimed:
            site.engine.submit(job(str(number), prompt, count))
            wanted[str(number)] = answer(prompt, count)
    found = site.run_out()
    assert {name: tokens for name, (tokens, _) in found.items()} == wanted
