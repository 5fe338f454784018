"""A guess at an answer, verified by the model that is to give it.

A guessed token is right if the model says the same token at its place by itself: the likeliest one,
or the one that the job's random number for that place draws. So an answer with a draft is the one
without (docs/decisions/0018-drafts-verified-by-equality.md).
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many

from services.worker.engine.batching.sequence import Sequence
from services.worker.engine.model.sampler import Rows, Sampled


def say(
    rows: Rows, first: int, sequence: Sequence, guess: tuple[int, ...]
) -> Iterator[Sampled | None]:
    """Yield the sequence's next token, and one more behind each guessed token that is right.

    `rows`: from `first` on, the logits behind the sequence's last token and behind each guessed
    one. Ends with None where they are not numbers.
    """
    index = sequence.next_index
    for place in range(1 + len(guess)):
        sampled = rows.sample(first + place, index + place)
        yield sampled
        if sampled is None or place == len(guess) or sampled.token_id != guess[place]:
            return


def count_right(guess: tuple[int, ...], said: Many[Sampled]) -> int:
    """Return how many guessed tokens became tokens of the answer."""
    pairs = zip(guess, said, strict=False)
    return sum(token_id == each.token_id for token_id, each in pairs)
