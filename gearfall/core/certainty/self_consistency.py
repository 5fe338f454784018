"""Self-consistency: a stage asks its model several times and counts the answers that are the same.

The first answer is the one that the request asks for; the others are drawn beside it at a
temperature of their own. Two are the same by the rule of `agreement.py`. Shown is one of the
largest group of equal answers, its most probable; of groups of one size that with the most probable
answer. Its certainty is

    (other answers that are the same + its own probability) / answers asked for

so that the count decides and the probability breaks ties: of n answers k equal ones have a
certainty above (k - 1) / n and of k / n at most. An answer that never came agrees with none.
Profiler, planner and router count by this module.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.errors import InvalidRequest

MEASURE = "self_consistency"
"""How reports call it."""
MIN_SAMPLES, MAX_SAMPLES = 2, 8
DEFAULT_TEMPERATURE = 0.7
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """How a stage asks."""

    samples: int
    """Answers in all, 2 to 8."""
    temperature: float = DEFAULT_TEMPERATURE
    """Of all but the first, above 0: at 0 all would be the same."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One whole answer."""

    key: str
    """Equal for answers that are the same."""
    probability: float
    """Of the answer by its model, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """What the answers so far come to."""

    place: int
    """Of the answer that is shown, among all that were asked for."""
    agreeing: int
    """Answers that are the same, it included."""
    lead: int
    """So many more than any other answer has; `agreeing` where there is no other."""
    certainty: float


def check_self_consistency(asked: SelfConsistency, where: str) -> None:
    """Raise InvalidRequest for a number of samples or a temperature that can't be."""
    if not MIN_SAMPLES <= asked.samples <= MAX_SAMPLES:
        raise InvalidRequest(
            f"{where}.samples {asked.samples} must be between {MIN_SAMPLES} and {MAX_SAMPLES}: "
            "answers of which the stage counts those that are the same",
            param=f"{where}.samples",
        )
    check_temperature(asked.temperature, f"{where}.temperature")


def check_temperature(temperature: float, where: str) -> None:
    """Raise InvalidRequest for one that answers can't be drawn at to be counted."""
    if not (math.isfinite(temperature) and 0.0 < temperature <= MAX_TEMPERATURE):
        raise InvalidRequest(
            f"{where} {temperature:g} must be above 0, where all answers would "
            f"be the same, and at most {MAX_TEMPERATURE:g}",
            param=where,
        )


def consensus(votes: Sequence[Vote | None]) -> Consensus | None:
    """Return what the answers come to; None without any.

    votes: one place for each answer asked for, None where there is none (yet).
    """
    groups: dict[str, list[int]] = {}
    for place, vote in enumerate(votes):
        if vote is not None:
            groups.setdefault(vote.key, []).append(place)
    if not groups:
        return None

    def probability(place: int) -> float:
        vote = votes[place]
        return 0.0 if vote is None else vote.probability

    shown = {key: max(places, key=probability) for key, places in groups.items()}
    first = max(groups, key=lambda key: (len(groups[key]), probability(shown[key])))
    agreeing = len(groups[first])
    second = max((len(each) for key, each in groups.items() if key != first), default=0)
    certainty = (agreeing - 1 + probability(shown[first])) / len(votes)
    return Consensus(shown[first], agreeing, agreeing - second, certainty)


def is_decided(found: Consensus, *, asked: int, pending: int, threshold: float) -> bool:
    """Whether the `pending` answers of those `asked` for can't change what becomes of the stage.

    Either the answer is certain enough now and no other one can overtake it, or none can become
    certain enough any more.
    """
    if pending == 0:
        return True
    if found.certainty >= threshold:
        return found.lead > pending
    return most_certainty(found, asked=asked, pending=pending) < threshold


def most_certainty(found: Consensus, *, asked: int, pending: int) -> float:
    """Return the certainty that no answer still to come can bring the stage above."""
    return (found.agreeing + pending) / asked
