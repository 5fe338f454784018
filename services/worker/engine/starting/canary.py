"""An engine's first pass: the canary, which touches every weight and makes every layer's cache."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.generation.canary import Canary, check_answer
from services.worker.engine.batching.kv_blocks import blocks_for
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.engine import Model


def run_canary(model: Model, canary: Canary) -> None:
    """Return if the model's greedy run gives the recorded answer; raise CorruptCheckpoint if not.

    The cache is used from block 0 on and is free again afterwards.
    """
    check_vocabulary(canary, model.vocabulary_size)
    blocks = range(blocks_for(len(canary.fed_token_ids)))
    check_logits(canary, model.forward(canary_step(canary, blocks)))


def check_vocabulary(canary: Canary, vocabulary_size: int) -> None:
    """Raise CorruptCheckpoint for a canary whose tokens a model can't be fed."""
    if max(canary.fed_token_ids) >= vocabulary_size:
        raise CorruptCheckpoint("the canary is of a model with another vocabulary")


def canary_step(canary: Canary, blocks: Sequence[int]) -> PackedStep:
    """Return the one pass that is fed prompt and answer together, with its cache in `blocks`.

    Where the best token of each row is the next one fed, a run token by token would have gone the
    same way, bit for bit on batch-invariant kernels. It is exact under any arithmetic: what the
    answer is held against is.
    """
    tokens = canary.fed_token_ids
    count = len(tokens)
    return PackedStep(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.arange(count, dtype=np.int32),
        seq_index=np.zeros(count, dtype=np.int32),
        block_tables=np.array([blocks], dtype=np.int32),
        logit_rows=np.arange(count - len(canary.answer), count, dtype=np.int64),
        exact_tokens=count,
    )


def check_logits(canary: Canary, logits: NDArray[np.float32]) -> None:
    """Raise CorruptCheckpoint if the rows of the answer's tokens are not as they were recorded."""
    if not np.isfinite(logits).all():
        raise CorruptCheckpoint("the model's first logits are not numbers")
    wanted = [token.token_id for token in canary.answer]
    logprobs = logits[range(len(wanted)), wanted] - _log_sum_exp(logits)
    best = logits.argmax(axis=-1)
    check_answer(canary, list(zip(best.tolist(), logprobs.tolist(), strict=True)))


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    return result
