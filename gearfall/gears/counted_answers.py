"""What a profile says of models that are asked several times: the planner's columns of that."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gearfall.core.certainty.certainty import answer_probability
from gearfall.core.certainty.self_consistency import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    SelfConsistency,
    Vote,
    consensus,
)
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile
from gearfall.gears.answers import ModelAnswers


@dataclass(frozen=True, slots=True)
class CountedAnswer:
    """What several answers to one query come to."""

    key: str
    """Of the answer that is shown."""
    quality: float
    certainty: float
    cost: float
    """Of all of them, to their ends."""
    output_tokens: tuple[int, ...]
    """Of each, at least 1; the usual answer first."""


def asked_several(profile: Profile, samples: int) -> SelfConsistency:
    """Return how the profile's models were asked.

    Raises InvalidRequest where it has too few drawn answers to say what `samples` would do.
    """
    if not MIN_SAMPLES <= samples <= MAX_SAMPLES:
        raise InvalidRequest(
            f"samples {samples}: between {MIN_SAMPLES} and {MAX_SAMPLES}, or 0 for none",
            param="samples",
        )
    for model in profile.models:
        least = min((known_answers(each) for each in model.generations), default=0)
        if least < samples:
            raise InvalidRequest(
                f"{model.name}: the profile has {max(0, least - 1)} drawn answers beside each one, "
                f"{samples - 1} are needed: run `gearfall profile --samples {samples - 1}`",
                param="samples",
            )
    return SelfConsistency(samples, profile.drawn_temperature)


def known_answers(each: Generation) -> int:
    """Return how many answers to one query are known by text and probability."""
    return 1 + len(each.drawn) if each.answer_key and each.certainty is None else 0


def counted(each: Generation, samples: int) -> CountedAnswer:
    """Return what the first `samples` answers to a query come to, the usual one among them."""
    drawn = each.drawn[: samples - 1]
    own = Vote(each.answer_key, answer_probability(each.logprobs))
    votes = (own, *(Vote(other.answer_key, other.probability) for other in drawn))
    others = (other.output_tokens for other in drawn)
    found = consensus(votes)
    assert found is not None, "the usual answer is one"
    return CountedAnswer(
        votes[found.place].key,
        (each.quality, *(other.quality for other in drawn))[found.place],
        found.certainty,
        each.cost + sum(other.cost for other in drawn),
        tuple(max(1, tokens) for tokens in (each.output_tokens, *others)),
    )


def counted_columns(
    name: str, answers: Sequence[Generation], several: SelfConsistency
) -> ModelAnswers:
    """Return a model's answers as the planner's columns of a stage that counts equal ones."""
    found = [counted(each, several.samples) for each in answers]
    return ModelAnswers(
        ModelName(name),
        np.array([each.quality for each in found]),
        np.array([each.certainty for each in found]),
        np.array([each.cost for each in found]),
        several,
    )


def counted_of(profile: Profile, several: SelfConsistency | None) -> tuple[ModelAnswers, ...]:
    """Return these columns of all models; none where no model is asked several times."""
    if several is None:
        return ()
    return tuple(counted_columns(each.name, each.generations, several) for each in profile.models)
