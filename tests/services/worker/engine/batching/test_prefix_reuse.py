"""Reused keys and values give the same logits as computing them, bit for bit, on a real model."""

import numpy as np
import pytest
import torch

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import NativeOps
from services.worker.engine_link.messages import CancelJob, SubmitJob
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint

BLOCKS = 24
PROMPT = [(7 * place * place + 3) % 67 for place in range(70)]


class Watched:
    """A model that notes what it was asked and what it said."""

    def __init__(self, model):
        self._model = model
        self.vocabulary_size = model.vocabulary_size
        self.computed = 0
        self.rows: list[np.ndarray] = []

    def forward(self, step):
        logits = self._model.forward(step)
        self.computed += len(step.token_ids)
        self.rows += [row.copy() for row in logits]
        return logits


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    with tiny_checkpoint(random_model(request.param), directory) as checkpoint:
        return build_model(
            checkpoint.manifest,
            checkpoint.map(),
            checkpoint.config_json,
            ops=NativeOps(2),
            device=torch.device("cpu"),
            kv_blocks=BLOCKS,
        )


def make(model, *, slots=4):
    watched = Watched(model)
    batch = Batch(KvBlocks(BLOCKS), slots=slots, step_tokens=32)
    return Engine(watched, batch, context_tokens=200), watched


def run(engine, watched, name, prompt, *, tenant="t"):
    """Answer one prompt alone; return (tokens, rows of logits, tokens computed)."""
    rows, computed = len(watched.rows), watched.computed
    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    engine.submit(SubmitJob(JobId(name), Epoch(1), tuple(prompt), (), sampling, tenant=tenant))
    tokens: list[int] = []
    while not engine.is_idle:
        for part in engine.step().runs:
            tokens += part.token_ids
    return tokens, np.stack(watched.rows[rows:]), watched.computed - computed


def rows_alone(model, prompt):
    """Return the rows of logits of a prompt that an engine has to itself."""
    engine, watched = make(model)
    return run(engine, watched, "alone", prompt)[1]


def test_a_prompt_that_was_seen_is_not_computed_again_and_nothing_changes(model):
    engine, watched = make(model)
    tokens, rows, computed = run(engine, watched, "first", PROMPT)
    assert computed == 70 + 5
    for name in ("second", "third"):
        again = run(engine, watched, name, PROMPT)
        assert again[0] == tokens
        assert (again[1] == rows).all()
        assert again[2] == 70 - 64 + 5
    other = run(engine, watched, "other tenant", PROMPT, tenant="u")
    assert (other[1] == rows).all()
    assert other[2] == computed


def test_a_prompt_that_differs_in_a_late_token_shares_what_is_before_it(model):
    engine, watched = make(model)
    prompt = [*PROMPT[:40], 1, *PROMPT[41:]]
    rows = rows_alone(model, prompt)
    run(engine, watched, "first", PROMPT)
    shared = run(engine, watched, "second", prompt)
    assert (shared[1] == rows).all()
    assert shared[2] == 70 - 32 + 5


def test_what_is_overwritten_is_not_reused(model):
    engine, watched = make(model)
    tokens, rows, computed = run(engine, watched, "first", PROMPT)
    for number in range(6):
        run(engine, watched, f"n{number}", [number, *PROMPT], tenant="t")
    again = run(engine, watched, "again", PROMPT)
    assert again[0] == tokens
    assert (again[1] == rows).all()
    assert again[2] == computed


def test_a_cancelled_jobs_full_blocks_are_known_and_its_open_one_is_not(model):
    engine, watched = make(model)
    rows = rows_alone(model, PROMPT)
    sampling = SamplingParams(max_tokens=6, temperature=0.0)
    engine.submit(SubmitJob(JobId("a"), Epoch(1), tuple(PROMPT[:60]), (), sampling, tenant="t"))
    engine.step()
    engine.cancel(CancelJob(JobId("a"), Epoch(1)))
    found = run(engine, watched, "b", PROMPT)
    assert (found[1] == rows).all()
    assert found[2] == 70 - 32 + 5
