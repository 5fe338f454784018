"""How much of a draft a step computes, and the blocks for it. Pure.

Nobody is preempted for a guess: it gets blocks that are free, and they go back if it has no use for
them.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine.batching.sequence import Chunk, Sequence, Stance

FIRST_GUESS_TOKENS = 16
"""Of a draft that are computed at first. As many more as were right before come with the next ones:
a wrong draft costs little, a right one few steps more than one."""


def take_room(blocks: KvBlocks, sequence: Sequence, most: int, step_tokens: int) -> int:
    """Return how many of at most `most` guessed tokens a step can compute; they have their blocks.

    None before all other tokens can be computed, nor while some are computed beside the steps.
    """
    if sequence.stance is not Stance.FREE or sequence.is_beside:
        return 0
    earned = FIRST_GUESS_TOKENS + sequence.next_index
    known = len(sequence.tokens)
    room = (len(blocks.table(sequence.key)) + blocks.free_blocks) * BLOCK_TOKENS - known
    guess = min(sequence.guessed, earned, most, step_tokens - sequence.pending, room)
    if guess <= 0:
        return 0
    is_extended = blocks.extend(sequence.key, known + guess)
    assert is_extended
    return guess


def give_back(
    blocks: KvBlocks, running: Iterable[tuple[Sequence, int]], chunks: Many[Chunk]
) -> None:
    """Take back the blocks of guesses that got no share of the step.

    `running`: who could compute how many tokens, guessed ones included.
    """
    ends = {chunk.sequence.key: chunk.start + chunk.count for chunk in chunks}
    for sequence, count in running:
        end = max(ends.get(sequence.key, 0), len(sequence.tokens))
        if sequence.computed + count > end:
            blocks.shrink(sequence.key, end)
