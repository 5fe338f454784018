"""An answer with a draft is the answer without, to the bit, whatever the draft and its way."""

import os
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.guesses import FIRST_GUESS_TOKENS
from services.worker.engine.batching.kv_blocks import KvBlocks, blocks_for
from services.worker.engine.batching.packing import pack_step
from services.worker.engine.engine import Engine
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps
from services.worker.engine.starting.dock import AdapterDock
from services.worker.engine_link.messages import (
    AttachAdapter,
    FeedJob,
    HoldJob,
    ReleaseJob,
    SubmitJob,
)
from tests.services.worker.counting_model import VOCABULARY, CountingModel, answer
from tests.services.worker.tiny_adapters import save_adapter, tiny_adapter
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

PROMPT = [3, 1, 4]
SHORT = FIRST_GUESS_TOKENS + 1
"""Tokens of an answer whose draft is verified in one step."""


def make_engine(*, total_blocks=24, slots=4, step_tokens=32, guess_tokens=None, context=200):
    model = CountingModel(total_blocks)
    batch = Batch(
        KvBlocks(total_blocks), slots=slots, step_tokens=step_tokens, guess_tokens=guess_tokens
    )
    return Engine(model, batch, context_tokens=context, clock=lambda: 0.0), model


def job(prompt, max_tokens, *, draft=(), generated=(), name="a", **sampling):
    sampling = {"temperature": 0.0} | sampling
    return SubmitJob(
        JobId(name),
        Epoch(1),
        tuple(prompt),
        tuple(generated),
        SamplingParams(max_tokens=max_tokens, **sampling),
        draft_token_ids=tuple(draft),
    )


def run_out(engine, limit=5000):
    """Step until idle; return each job's runs."""
    found: dict[str, list[TokenRun]] = {}
    for _ in range(limit):
        if engine.is_idle:
            return found
        for run in engine.step().runs:
            found.setdefault(run.job_id, []).append(run)
        engine.check()
    raise AssertionError("the engine never became idle")


def joined(runs):
    """What runs say together: index, tokens, logprobs, margins, alternatives, finish."""
    at = runs[0].index
    for run in runs:
        assert run.index == at
        assert len(run.token_ids) == len(run.logprobs) == len(run.margins)
        at += len(run.token_ids)
    return (
        runs[0].index,
        *(sum((getattr(run, name) for run in runs), ()) for name in _LISTS),
        runs[-1].finish,
        runs[0].cached_tokens,
    )


_LISTS = ("token_ids", "logprobs", "margins", "alternatives")


@st.composite
def cases(draw):
    prompt = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60))
    sampling: dict[str, Any] = {"seed": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        sampling |= {"temperature": 2.0, "top_k": draw(st.sampled_from((0, 5)))}
    sampling |= {
        "stop_token_ids": tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2))),
        "ignore_eos": draw(st.booleans()),
        "top_logprobs": draw(st.sampled_from((0, 2))),
    }
    flips = draw(st.sets(st.integers(0, 70), max_size=3))
    return prompt, draw(st.integers(1, 60)), sampling, flips, draw(st.integers(0, 70))


@given(
    several=st.lists(cases(), min_size=1, max_size=5),
    total_blocks=st.integers(9, 24),
    slots=st.integers(1, 4),
    step_tokens=st.integers(4, 64),
    guess_tokens=st.integers(0, 40),
)
def test_a_draft_changes_nothing_but_the_steps(
    several, total_blocks, slots, step_tokens, guess_tokens
):
    """Right, wrong from any place on, too long or short; preempted and cut into steps or not."""
    fields = {"total_blocks": total_blocks, "context": 130}
    plain, _ = make_engine(slots=1, step_tokens=256, **fields)
    for number, (prompt, most, sampling, _, _) in enumerate(several):
        plain.submit(job(prompt, most, name=str(number), **sampling))
    without = {name: joined(runs) for name, runs in run_out(plain).items()}
    engine, model = make_engine(
        slots=slots, step_tokens=step_tokens, guess_tokens=guess_tokens, **fields
    )
    for number, (prompt, most, sampling, flips, length) in enumerate(several):
        whole = [*without[str(number)][1], *range(VOCABULARY), *range(VOCABULARY)][:length]
        draft = [(token + (at in flips)) % VOCABULARY for at, token in enumerate(whole)]
        engine.submit(job(prompt, most, draft=draft, name=str(number), **sampling))
    found = run_out(engine)
    assert {name: joined(runs)[:-1] for name, runs in found.items()} == {
        name: each[:-1] for name, each in without.items()
    }
    for runs in found.values():
        for run in runs:
            assert run.accepted_draft_tokens <= run.draft_tokens <= guess_tokens
            more = len(run.token_ids) - run.accepted_draft_tokens
            assert more == (1 if run.token_ids else 0)
    assert max(len(step.token_ids) for step in model.steps) <= step_tokens
    assert max(len(step.logit_rows) for step in model.steps) <= guess_tokens + slots


def test_a_right_draft_is_one_step():
    whole = answer(PROMPT, SHORT)
    engine, model = make_engine()
    engine.submit(job(PROMPT, SHORT, draft=whole))
    (run,) = run_out(engine)["a"]
    assert list(run.token_ids) == whole
    assert run.finish is FinishReason.LENGTH
    assert (run.draft_tokens, run.accepted_draft_tokens) == (16, 16), "the last is said anyway"
    assert len(model.steps) == 1


def test_a_guess_grows_as_it_is_right():
    whole = answer(PROMPT, 150)
    engine, model = make_engine(step_tokens=256)
    engine.submit(job(PROMPT, 150, draft=whole))
    runs = run_out(engine)["a"]
    assert [run.draft_tokens for run in runs] == [16, 33, 67, 30]
    assert [token for run in runs for token in run.token_ids] == whole
    assert [len(step.token_ids) for step in model.steps] == [3 + 16, 1 + 33, 1 + 67, 1 + 30]


def test_a_wrong_draft_leaves_nothing_behind():
    engine, model = make_engine()
    engine.submit(job(PROMPT, 200, draft=[answer(PROMPT, 1)[0], *[7] * 28]))
    done = engine.step()
    (run,) = done.runs
    assert (run.draft_tokens, run.accepted_draft_tokens, len(run.token_ids)) == (16, 1, 2)
    assert len(model.steps[0].token_ids) == 3 + 16
    assert done.kv_used_blocks == 1
    (run,) = engine.step().runs
    assert (run.draft_tokens, len(model.steps[1].token_ids)) == (0, 1)


def test_what_a_stop_token_ends_is_not_verified():
    whole = answer(PROMPT, SHORT)
    stop = whole[6]
    first = whole.index(stop)
    for ignore_eos, verified in ((False, first), (True, SHORT - 1)):
        engine, _ = make_engine()
        fields = {"stop_token_ids": (stop,), "ignore_eos": ignore_eos}
        engine.submit(job(PROMPT, SHORT, draft=whole, **fields))
        (run,) = run_out(engine)["a"]
        assert run.draft_tokens == run.accepted_draft_tokens == verified
        assert list(run.token_ids) == whole[: verified + 1]
        assert run.finish is (FinishReason.LENGTH if ignore_eos else FinishReason.STOP)


@pytest.mark.parametrize("cut", [2, 3, 7, 18, 19])
def test_a_resumed_job_has_the_rest_of_its_draft_verified(cut):
    whole = answer(PROMPT, 20)
    engine, _ = make_engine()
    engine.submit(job(PROMPT, 20, draft=whole, generated=whole[:cut]))
    (run,) = run_out(engine)["a"]
    assert (run.index, list(run.token_ids)) == (cut, whole[cut:])
    assert run.draft_tokens == 19 - cut


def test_a_draft_that_the_log_contradicts_is_of_no_use():
    whole = answer(PROMPT, 20)
    engine, model = make_engine()
    engine.submit(job(PROMPT, 20, draft=[whole[0] + 1, *whole[1:]], generated=whole[:3]))
    run_out(engine)
    assert [len(step.token_ids) for step in model.steps] == [6, *[1] * 16]


@pytest.mark.parametrize("bad", [VOCABULARY, -1, 10**12])
def test_a_draft_outside_the_vocabulary_ends_its_job_alone(bad):
    engine, _ = make_engine()
    engine.submit(job([7, 7], 5, name="good", draft=answer([7, 7], 5)))
    engine.submit(job(PROMPT, 5, name="bad", draft=[1, bad]))
    found = run_out(engine)
    assert found["good"][-1].finish is FinishReason.LENGTH
    assert found["bad"][-1].finish is FinishReason.ERROR
    assert f"the draft is not one of this model: token id {bad}" in found["bad"][-1].error


def test_logits_that_are_no_numbers_end_the_job_behind_what_was_right():
    whole = answer(PROMPT, 20)
    engine, model = make_engine()
    model.poison = whole[9]
    engine.submit(job(PROMPT, 20, draft=whole))
    (run,) = run_out(engine)["a"]
    assert list(run.token_ids) == whole[: whole.index(whole[9]) + 1]
    assert run.finish is FinishReason.ERROR


def test_nobody_is_preempted_for_a_guess():
    """Two jobs fill the cache; one has a draft that would need the other's room."""
    engine, _ = make_engine(total_blocks=5, slots=2)
    engine.submit(job([5] * 14, 40, name="plain"))
    engine.step()
    engine.submit(job([6] * 14, 40, name="drafted", draft=[9] * 12))
    for _ in range(8):
        assert "plain" in {run.job_id for run in engine.step().runs}
        engine.check()
    found = run_out(engine)
    assert found["drafted"][-1].finish is FinishReason.LENGTH


def test_those_who_decode_get_their_token_beside_a_long_draft():
    engine, model = make_engine(step_tokens=8, total_blocks=40)
    for name in ("one", "two"):
        engine.submit(job([len(name)], 30, name=name))
        engine.step()
    whole = answer(PROMPT, 60)
    engine.submit(job(PROMPT, 60, draft=whole))
    for _ in range(6):
        assert {"one", "two"} <= {run.job_id for run in engine.step().runs}
    assert max(len(step.token_ids) for step in model.steps) == 8
    assert len(model.steps) < 20


def test_a_guess_without_a_share_of_the_step_keeps_no_blocks():
    engine, _ = make_engine(step_tokens=8)
    for name in ("a", "b"):
        engine.submit(job(PROMPT, 40, name=name, draft=answer(PROMPT, 40)))
    for _ in range(3):
        done = engine.step()
        lengths = [len(PROMPT) + run.index + len(run.token_ids) for run in done.runs]
        assert sum(blocks_for(length) for length in lengths) <= done.kv_used_blocks <= 4
    found = run_out(engine)
    assert {runs[-1].finish for runs in found.values()} == {FinishReason.LENGTH}


def test_a_job_that_moves_takes_its_draft_along():
    whole = answer(PROMPT, 40)
    target, model = make_engine(step_tokens=64)
    held = job(PROMPT, 40, draft=[*whole[:30], whole[30] + 1, 0, 0], generated=whole[:4])
    target.migrate(HoldJob(held))
    target.step()
    target.migrate(FeedJob(JobId("a"), Epoch(1), 4, tuple(whole[4:11])))
    target.step()
    before = len(model.steps)
    target.migrate(ReleaseJob(JobId("a"), Epoch(1)))
    runs = run_out(target)["a"]
    assert (runs[0].index, runs[0].accepted_draft_tokens) == (11, 19)
    assert [token for run in runs for token in run.token_ids] == whole[11:]
    assert len(model.steps) - before < 12


def test_a_foretold_job_has_the_rest_of_its_draft_verified():
    whole = answer(PROMPT, SHORT)
    model, blocks = CountingModel(8), KvBlocks(8)
    engine = Engine(model, Batch(blocks, slots=1, step_tokens=64), context_tokens=100)
    drafted = job(PROMPT, SHORT, draft=whole)
    chunks = engine.foretelling.begin([drafted])
    engine.foretelling.end(chunks, model.forward(pack_step(chunks, blocks)))
    engine.submit(drafted)
    runs = run_out(engine)["a"]
    assert [len(run.token_ids) for run in runs] == [1, 16]
    assert joined(runs)[1] == tuple(whole)


FAMILIES = ("llama", "gemma2", "gpt2", "opt")
REAL_PROMPT = [5, 9, 1, 33, 20, 4, 4, 60, 18, 2, 11]
WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "seed": 5, "top_logprobs": 4},
    "cut": {"temperature": 1.1, "seed": 8, "top_k": 9, "top_p": 0.8},
}


class RealEngines:
    """Engines over one tiny checkpoint with a LoRA adapter."""

    def __init__(self, family, home, stack):
        random = random_model(family)
        self.checkpoint = stack.enter_context(tiny_checkpoint(random, home))
        targets = {"gpt2": ("c_attn",)}.get(family, ("q_proj", "v_proj"))
        source = save_adapter(random, targets, home / "adapter", seed=3)
        made = tiny_adapter(source, self.checkpoint.manifest)
        self.adapter = stack.enter_context(made)

    def make(self, arithmetic, **limits):
        model = build_model(
            self.checkpoint.manifest,
            self.checkpoint.map(),
            self.checkpoint.config_json,
            ops=NativeOps(2),
            device=torch.device("cpu"),
            kv_blocks=64,
        )
        model.use(arithmetic)
        batch = Batch(KvBlocks(64), slots=4, **limits)
        dock = AdapterDock(model.adapters, self.checkpoint.manifest_json)
        engine = Engine(model, batch, context_tokens=200, adapters=dock)
        adapter = self.adapter
        message = AttachAdapter(adapter.digest, "tuned", adapter.manifest_json, adapter.config_json)
        engine.attach(message, [os.dup(descriptor) for descriptor in adapter.partition_fds])
        assert not engine.step().adapters[0].error
        return engine


@pytest.fixture(scope="module", params=FAMILIES)
def real(request, tmp_path_factory):
    with ExitStack() as stack:
        yield RealEngines(request.param, tmp_path_factory.mktemp("drafts"), stack)


@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_real_logits_have_the_same_bits_behind_a_draft(real, arithmetic):
    """Tokens, log-probabilities, margins and alternatives, with an adapter and without."""
    jobs = [
        msgspec.structs.replace(
            job(REAL_PROMPT, 30, name=f"{way} {adapter[:2]}", ignore_eos=True, **sampling),
            adapter=adapter,
        )
        for way, sampling in WAYS.items()
        for adapter in ("", real.adapter.digest)
    ]
    without = run_jobs(real.make(arithmetic, step_tokens=64), jobs)
    assert len({joined(runs)[1] for runs in without.values()}) == len(jobs), "all answers differ"
    for step_tokens, wrong_at in ((64, None), (64, 6), (9, None), (9, 17)):
        drafted = []
        for each in jobs:
            draft = list(joined(without[each.job_id])[1])
            if wrong_at is not None:
                draft[wrong_at] = (draft[wrong_at] + 1) % 67
            drafted.append(msgspec.structs.replace(each, draft_token_ids=tuple(draft)))
        found = run_jobs(real.make(arithmetic, step_tokens=step_tokens), drafted)
        for name, runs in found.items():
            assert joined(runs)[:-1] == joined(without[name])[:-1]
            most = 29 if wrong_at is None else wrong_at
            assert sum(run.accepted_draft_tokens for run in runs) >= most / 4


def run_jobs(engine, jobs):
    for each in jobs:
        engine.submit(each)
    return run_out(engine)
