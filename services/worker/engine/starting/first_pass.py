"""An engine's first pass over its weights: the canary, and beside it the jobs that wait."""

from collections.abc import Sequence as Many

from gearfall.core.generation.canary import Canary
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.batching.packing import join_steps, pack_step
from services.worker.engine.engine import Model
from services.worker.engine.foretelling import Foretelling
from services.worker.engine.starting.canary import canary_step, check_logits, check_vocabulary
from services.worker.engine_link.messages import SubmitJob

_CANARY = "canary"
"""Owner of the canary's blocks while the pass lasts."""


def run_first_pass(
    model: Model,
    canary: Canary,
    blocks: KvBlocks,
    foretelling: Foretelling,
    jobs: Many[SubmitJob],
) -> None:
    """Return if the model gives the canary's answer, with what it says to `jobs` foretold.

    Raises CorruptCheckpoint if it does not; then nothing is foretold. A token does not hang on
    what is computed beside it, so the canary is as strict in company as alone.
    """
    check_vocabulary(canary, model.vocabulary_size)
    is_there = blocks.extend(_CANARY, len(canary.fed_token_ids))
    assert is_there
    step, chunks = canary_step(canary, blocks.table(_CANARY)), foretelling.begin(jobs)
    logits = model.forward(join_steps(step, pack_step(chunks, blocks)) if chunks else step)
    blocks.free(_CANARY)
    answers = len(canary.answer)
    check_logits(canary, logits[:answers])
    foretelling.end(chunks, logits[answers:])
