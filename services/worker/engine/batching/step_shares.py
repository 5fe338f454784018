"""How the tokens of one step are parted among the sequences that run. Pure."""

from collections.abc import Sequence as Many

from services.worker.engine.batching.sequence import Chunk, Sequence

_OLDEST_SHARE = 4
"""A quarter of a step's prefill is for the sequence that has waited longest for its own."""


def share_out(
    running: Many[tuple[Sequence, int]], step_tokens: int, held_tokens: int
) -> list[Chunk]:
    """Return the next step's chunks of at most `step_tokens`, given who runs and may compute what.

    Of held sequences no more than `held_tokens` in all.

    One token to each that decodes, the rest to prefills in the order of `running`, what they leave
    to the guesses of those that decode. The oldest prefill gets a part of that in every step, so
    that no stream of those that come first keeps it from its end.
    """
    running = _held_within(running, held_tokens)
    decoding = [
        (one, count) for one, count in running if count == 1 or (count and one.pending == 1)
    ]
    shares = {one.key: Chunk(one, one.computed, 1) for one, _ in decoding[:step_tokens]}
    prefilling = [(one, count) for one, count in running if count > 1 and one.pending > 1]
    room = step_tokens - len(shares)
    oldest, its_wanted = min(
        ((one.standing.arrival, count) for one, count in prefilling), default=(0, 0)
    )
    reserved = min(its_wanted, -(-room // _OLDEST_SHARE))
    for sequence, wanted in prefilling:
        if sequence.standing.arrival == oldest:
            reserved = 0
        count = min(wanted, room - reserved)
        if count > 0:
            shares[sequence.key] = Chunk(sequence, sequence.computed, count)
            room -= count
    for sequence, wanted in decoding:
        guess = min(wanted - 1, room)
        if guess > 0:
            shares[sequence.key] = Chunk(sequence, sequence.computed, 1 + guess)
            room -= guess
    return list(shares.values())


def _held_within(
    running: Many[tuple[Sequence, int]], held_tokens: int
) -> list[tuple[Sequence, int]]:
    """Return the same with at most `held_tokens` for all held ones, those in front first."""
    within = []
    for one, wanted in running:
        count = min(wanted, held_tokens) if one.is_held else wanted
        held_tokens -= count if one.is_held else 0
        within.append((one, count))
    return within
