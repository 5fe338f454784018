"""What models answer to queries, as far as a simulation has to know it."""

from collections.abc import Mapping
from dataclasses import dataclass

from gearfall.core.ids import ModelName
from gearfall.core.records import Stage

END = -1
"""In place of the token that ends an answer, whatever it is to its model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer to one query."""

    prompt_tokens: int
    output_tokens: int
    certainty: float
    quality: float
    """In [0, 1]."""
    cost: float
    token_ids: tuple[int, ...] = ()
    """Comparable between models; empty where they are unknown: then nothing goes up as a draft."""
    reach: tuple[float, ...] = ()
    """After each token the most certainty that the answer could still have; empty: unknown."""
    beside: tuple[int, ...] = ()
    """Tokens of the answers that are asked for beside it; certainty, quality and cost are then
    those of all together."""
    counted: "Answer | None" = None
    """The same query to the model asked several times; None where that is not known."""

    def tokens_until(self, threshold: float | None) -> int:
        """Return how many tokens are generated before it is certain that the answer goes up."""
        if threshold is None:
            return self.output_tokens
        stops = (at for at, most in enumerate(self.reach, start=1) if most < threshold)
        return min(next(stops, self.output_tokens), self.output_tokens)


Query = Mapping[ModelName, Answer]
"""By model."""


def answer_at(query: Query, stage: Stage) -> Answer:
    """Return what a stage answers, asked as it asks."""
    answer = query[stage.model]
    if stage.self_consistency is None:
        return answer
    assert answer.counted is not None, f"how {stage.model} answers several times is not known"
    return answer.counted


def shared_tokens(draft: tuple[int, ...], answer: tuple[int, ...]) -> int:
    """Return how many tokens of a draft the model would have said itself."""
    same = 0
    for said, wanted in zip(draft, answer, strict=False):
        if said != wanted:
            break
        same += 1
    return same
