"""Continuous batching over a model that checks its packing: every job gets its own answer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import FinishReason, Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import CancelJob, SubmitJob
from tests.services.worker.counting_model import VOCABULARY, CountingModel, answer


def make_engine(*, total_blocks=16, slots=4, step_tokens=32, context_tokens=200):
    model = CountingModel(total_blocks)
    batch = Batch(KvBlocks(total_blocks), slots=slots, step_tokens=step_tokens)
    return Engine(model, batch, context_tokens=context_tokens, clock=lambda: 0.0), model


def job(
    name,
    prompt,
    max_tokens,
    *,
    generated=(),
    epoch=1,
    priority=Priority.INTERACTIVE,
    deadline_unix_s=0.0,
    **sampling,
):
    return SubmitJob(
        JobId(name),
        Epoch(epoch),
        tuple(prompt),
        tuple(generated),
        SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling),
        priority=priority,
        deadline_unix_s=deadline_unix_s,
    )


def run_out(engine, answers=None, limit=5000):
    """Step until idle; return {job: (tokens, last run)} with indices checked."""
    found = {} if answers is None else answers
    for _ in range(limit):
        if engine.is_idle:
            return found
        for run in engine.step().runs:
            tokens, _ = found.get(run.job_id, ([], None))
            found[run.job_id] = (tokens + list(run.token_ids), run)
        engine.check()
    raise AssertionError("the engine never became idle")


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=90)


@given(
    jobs=st.lists(
        st.tuples(prompts, st.integers(1, 40), st.integers(0, 6)), min_size=1, max_size=9
    ),
    total_blocks=st.integers(9, 20),
    slots=st.integers(1, 5),
    step_tokens=st.integers(5, 64),
)
def test_every_job_gets_its_own_answer(jobs, total_blocks, slots, step_tokens):
    """Whatever is admitted, chunked, preempted and computed again on the way."""
    engine, model = make_engine(
        total_blocks=total_blocks, slots=slots, step_tokens=step_tokens, context_tokens=140
    )
    found: dict[str, Any] = {}
    for number, (prompt, max_tokens, pause) in enumerate(jobs):
        engine.submit(job(str(number), prompt, max_tokens))
        for _ in range(pause):
            if not engine.is_idle:
                for run in engine.step().runs:
                    tokens, _ = found.get(run.job_id, ([], None))
                    assert run.index == len(tokens)
                    found[run.job_id] = (tokens + list(run.token_ids), run)
    run_out(engine, found)
    for number, (prompt, max_tokens, _) in enumerate(jobs):
        tokens, last = found[str(number)]
        assert tokens == answer(prompt, max_tokens)
        assert last.finish is FinishReason.LENGTH
    assert max(len(step.token_ids) for step in model.steps) <= step_tokens


def test_blocks_run_out_and_nothing_is_lost():
    engine, model = make_engine(total_blocks=6, slots=4)
    for number in range(4):
        engine.submit(job(str(number), [number + 1] * 14, 70))
    found = run_out(engine)
    assert {name: tokens for name, (tokens, _) in found.items()} == {
        str(number): answer([number + 1] * 14, 70) for number in range(4)
    }
    recomputed = sum(len(step.token_ids) for step in model.steps)
    assert recomputed > 4 * (14 + 70 - 1), "somebody should have been preempted"


@pytest.mark.parametrize("cut", [0, 1, 5, 19])
def test_a_resumed_job_goes_on_behind_its_log(cut):
    engine, _ = make_engine()
    whole = answer([3, 1, 4], 20)
    engine.submit(job("a", [3, 1, 4], 20, generated=whole[:cut]))
    first = engine.step().runs[0]
    assert first.index == cut
    tokens, last = run_out(engine).get("a", ([], first))
    assert [*first.token_ids, *tokens] == whole[cut:]
    assert last.finish is FinishReason.LENGTH


def test_a_stop_token_is_the_last_and_counts():
    whole = answer([3, 1, 4], 20)
    stop = whole[6]
    expected = whole[: whole.index(stop) + 1]
    for ignore_eos in (False, True):
        engine, _ = make_engine()
        engine.submit(job("a", [3, 1, 4], 20, stop_token_ids=(stop,), ignore_eos=ignore_eos))
        tokens, last = run_out(engine)["a"]
        assert tokens == (whole if ignore_eos else expected)
        assert last.finish is (FinishReason.LENGTH if ignore_eos else FinishReason.STOP)


@pytest.mark.parametrize(
    ("generated", "max_tokens", "finish"),
    [((5, 8), 2, FinishReason.LENGTH), ((5, 9), 8, FinishReason.STOP)],
)
def test_a_log_that_is_complete_ends_at_once(generated, max_tokens, finish):
    engine, model = make_engine()
    engine.submit(job("a", [1], max_tokens, generated=generated, stop_token_ids=(9,)))
    (run,) = engine.step().runs
    assert (run.finish, run.index, run.token_ids) == (finish, 2, ())
    assert engine.is_idle
    assert not model.steps


@pytest.mark.parametrize(("total_blocks", "context"), [(16, 20), (1, 200)])
def test_the_context_or_the_cache_ends_a_job(total_blocks, context):
    engine, _ = make_engine(total_blocks=total_blocks, context_tokens=context)
    engine.submit(job("a", [2] * 10, 500))
    tokens, last = run_out(engine)["a"]
    limit = min(context, total_blocks * BLOCK_TOKENS)
    assert tokens == answer([2] * 10, limit - 10)
    assert last.finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (job("bad", [], 5), "no token"),
        (job("bad", [1] * 200, 5), "at most 199"),
        (job("bad", [1, VOCABULARY], 5), f"token id {VOCABULARY} is outside"),
        (job("bad", [1, -4], 5), "token id -4 is outside"),
        (job("bad", [1], 5, generated=[10**12]), "outside"),
        (job("bad", [1], 500, generated=[1] * 200), "more than 200"),
    ],
)
def test_a_bad_job_ends_alone(bad, text):
    engine, _ = make_engine()
    engine.submit(job("good", [7, 7], 5))
    engine.submit(bad)
    found = run_out(engine)
    assert found["good"][0] == answer([7, 7], 5)
    tokens, last = found["bad"]
    assert tokens == []
    assert last.finish is FinishReason.ERROR
    assert text in last.error


def test_a_job_whose_logits_are_not_numbers_ends_alone():
    engine, model = make_engine()
    model.poison = 30
    engine.submit(job("good", [7, 7], 5))
    engine.submit(job("bad", [30], 5))
    found = run_out(engine)
    assert found["good"][1].finish is FinishReason.LENGTH
    assert found["bad"][1].finish is FinishReason.ERROR


def test_a_cancelled_job_is_gone_before_the_next_step():
    engine, _ = make_engine(slots=1)
    engine.submit(job("a", [1], 50))
    engine.submit(job("b", [2], 3))
    engine.submit(job("c", [4], 3))
    assert [run.job_id for run in engine.step().runs] == ["a"]
    engine.cancel(CancelJob(JobId("a"), Epoch(2)))
    assert [run.job_id for run in engine.step().runs] == ["a"]
    engine.cancel(CancelJob(JobId("a"), Epoch(1)))
    engine.cancel(CancelJob(JobId("c"), Epoch(1)))
    engine.check()
    found = run_out(engine)
    assert set(found) == {"b"}
    assert found["b"][0] == answer([2], 3)


def test_a_deadline_ends_a_job_at_the_step_after_it():
    now = {"unix": 1000.0, "steps": 5.0}
    batch = Batch(KvBlocks(16), slots=1, step_tokens=32)
    engine = Engine(
        CountingModel(16),
        batch,
        context_tokens=200,
        clock=lambda: now["steps"],
        unix_clock=lambda: now["unix"],
    )
    engine.submit(job("runs", [1], 50, deadline_unix_s=1003.0))
    engine.submit(job("waits", [2], 50, deadline_unix_s=1002.0))
    engine.submit(job("late", [2], 50, deadline_unix_s=999.0))
    engine.submit(job("goes on", [4], 3))
    ended = {}
    for second in range(4):
        now["steps"] = 5.0 + second
        for run in engine.step().runs:
            if run.finish is not None:
                ended[run.job_id] = (second, run.finish, run.index)
        engine.check()
    assert ended == {
        "late": (0, FinishReason.DEADLINE, 0),
        "waits": (2, FinishReason.DEADLINE, 0),
        "runs": (3, FinishReason.DEADLINE, 3),
    }
    assert run_out(engine)["goes on"][1].finish is FinishReason.LENGTH


def test_an_interactive_job_displaces_a_batch_job_in_the_next_step():
    engine, _ = make_engine(slots=1)
    engine.submit(job("batch", [1], 20, priority=Priority.BATCH))
    assert [run.job_id for run in engine.step().runs] == ["batch"]
    engine.submit(job("chat", [2], 3))
    ran = [run.job_id for _ in range(4) for run in engine.step().runs]
    assert ran == ["chat", "chat", "chat", "batch"]
    assert run_out(engine)["batch"][0] == answer([1], 20)[2:]


@pytest.mark.parametrize(
    ("slots", "total_blocks", "prompt_tokens"),
    [(2, 32, 20), (6, 8, 40), (6, 8, 90)],
    ids=["slots are short", "memory is short", "memory is short for a long prompt"],
)
def test_batch_jobs_give_way_within_one_step_and_lose_no_token(slots, total_blocks, prompt_tokens):
    """Two batch jobs hold all there is; the first token comes from the very next step."""
    engine, _ = make_engine(slots=slots, total_blocks=total_blocks, step_tokens=128)
    for name in ("old", "young"):
        engine.submit(job(name, [len(name)] * 40, 40, priority=Priority.BATCH))
    answers: dict[str, Any] = {}
    for _ in range(10):
        for run in engine.step().runs:
            tokens, _ = answers.get(run.job_id, ([], None))
            answers[run.job_id] = (tokens + list(run.token_ids), run)
    assert {name: len(tokens) for name, (tokens, _) in answers.items()} == {"old": 10, "young": 10}
    prompt = [9] * prompt_tokens
    engine.submit(job("chat", prompt, 5))
    runs = {run.job_id: run for run in engine.step().runs}
    assert runs["chat"].index == 0
    assert runs["chat"].token_ids == tuple(answer(prompt, 1))
    assert len(runs) < 3, "one of them gave way"
    for name, run in runs.items():
        tokens, _ = answers.get(name, ([], None))
        answers[name] = (tokens + list(run.token_ids), run)
    ended = run_out(engine, answers)
    for name in ("old", "young"):
        assert ended[name][0] == answer([len(name)] * 40, 40)


def test_an_answers_first_run_says_what_was_cached():
    engine, _ = make_engine()
    found = []
    for name in ("first", "second"):
        engine.submit(job(name, [3] * 40, 3))
        found.append([run.cached_tokens for _ in range(5) for run in engine.step().runs])
    assert found == [[0, 0, 0], [32, 0, 0]]
    engine.submit(job("resumed", [3] * 40, 3, generated=answer([3] * 40, 1)))
    assert run_out(engine)["resumed"][1].cached_tokens == 0


def test_a_second_submission_changes_nothing():
    engine, _ = make_engine()
    for _ in range(2):
        engine.submit(job("a", [1], 4))
    assert run_out(engine)["a"][0] == answer([1], 4)


def test_a_long_prompt_does_not_stall_the_others():
    engine, model = make_engine(step_tokens=8)
    engine.submit(job("short", [1], 12))
    engine.step()
    engine.submit(job("long", [2] * 60, 2))
    for _ in range(8):
        assert "short" in {run.job_id for run in engine.step().runs}
    assert max(len(step.token_ids) for step in model.steps) == 8
    assert run_out(engine)["long"][0] == answer([2] * 60, 2)
