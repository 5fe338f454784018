"""An engine's first pass: the canary, which touches every weight and makes every layer's cache."""

import numpy as np
from numpy.typing import NDArray

from gearfall.core.canary import Canary, check_answer
from gearfall.core.errors import CorruptCheckpoint
from services.worker.engine.engine import Model
from services.worker.engine.kv_blocks import BLOCK_TOKENS
from services.worker.engine.packing import PackedStep


def run_canary(model: Model, canary: Canary) -> None:
    """Return if the model's greedy run gives the recorded answer; raise CorruptCheckpoint if not.

    One pass is fed prompt and answer together: where the best token of each row is the next one
    fed, a run token by token would have gone the same way, bit for bit on batch-invariant kernels.
    The cache is used from block 0 on and is free again afterwards.
    """
    if max(canary.fed_token_ids) >= model.vocabulary_size:
        raise CorruptCheckpoint("the canary is of a model with another vocabulary")
    logits = model.forward(_one_sequence(canary))
    if not np.isfinite(logits).all():
        raise CorruptCheckpoint("the model's first logits are not numbers")
    wanted = [token.token_id for token in canary.answer]
    logprobs = logits[range(len(wanted)), wanted] - _log_sum_exp(logits)
    best = logits.argmax(axis=-1)
    check_answer(canary, list(zip(best.tolist(), logprobs.tolist(), strict=True)))


def _one_sequence(canary: Canary) -> PackedStep:
    tokens = canary.fed_token_ids
    count = len(tokens)
    blocks = -(-count // BLOCK_TOKENS)
    return PackedStep(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.arange(count, dtype=np.int32),
        seq_index=np.zeros(count, dtype=np.int32),
        block_tables=np.arange(blocks, dtype=np.int32).reshape(1, blocks),
        logit_rows=np.arange(count - len(canary.answer), count, dtype=np.int64),
    )


def _log_sum_exp(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = np.log(np.exp(wide - top).sum(axis=-1)) + top[:, 0]
    return result
