"""The demo's question language: additions and subtractions as text, with a held-out tenth.

A question is `<left><operator><right>=` and its answer the exact integer in plain decimal:
`123+45=` -> `168`. A subtraction may be negative and is then written with a leading minus:
`45-123=` -> `-78`. Operands are never negative and have no leading zeros.

Which split a question belongs to follows from its text alone, so that every process, seed and
machine agrees: crc32 of `<left><operator><right>` modulo 20 puts one twentieth in CALIBRATION,
one twentieth in TEST and the rest in TRAINING.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from types import MappingProxyType

OPERATORS = ("+", "-")
LEVELS = (1, 2, 3, 4, 5, 6)
SPLIT_BUCKETS = 20

TRAINING_MIX: Mapping[int, float] = MappingProxyType(
    {1: 0.05, 2: 0.19, 3: 0.19, 4: 0.19, 5: 0.19, 6: 0.19}
)
"""Share of each level in a training batch: level 1 has only 200 questions, so it needs little."""

TRAINING_SUBTRACTIONS = 0.65
"""Share of subtractions in training, where they are harder to learn; elsewhere it is a half."""

TRAFFIC_MIX: Mapping[int, float] = MappingProxyType(
    {1: 0.02, 2: 0.30, 3: 0.26, 4: 0.18, 5: 0.14, 6: 0.10}
)
"""Share of each level in the held-out sets: many easy questions, some hard, as a cascade meets."""


class Split(Enum):
    """What a question may be used for."""

    TRAINING = "training"
    CALIBRATION = "calibration"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its one right answer."""

    prompt: str
    """What the model is given, ending in `=`."""
    answer: str
    """What it must generate before it ends, digit for digit."""
    level: int
    """Digits of the longer operand, 1 to 6."""


def ask(left: int, operator: str, right: int) -> Question:
    """Write one question down; ValueError for a negative operand or an unknown operator."""
    if operator not in OPERATORS:
        raise ValueError(f"operator {operator!r} is not one of {OPERATORS}")
    if left < 0 or right < 0:
        raise ValueError(f"operands must not be negative: {left}, {right}")
    result = left + right if operator == "+" else left - right
    level = max(len(str(left)), len(str(right)))
    return Question(prompt=f"{left}{operator}{right}=", answer=str(result), level=level)


def split_of(question: Question) -> Split:
    """The split a question belongs to, from its text alone."""
    bucket = zlib.crc32(question.prompt.removesuffix("=").encode("ascii")) % SPLIT_BUCKETS
    if bucket == 0:
        return Split.CALIBRATION
    return Split.TEST if bucket == 1 else Split.TRAINING


def is_correct(question: Question, generated: str) -> bool:
    """Exact match, digit for digit: the judge forgives neither spaces nor leading zeros."""
    return generated == question.answer


def draw(level: int, split: Split, rng: Random) -> Question:
    """Draw one question of `level` from `split`.

    One operand has `level` digits, the other 1 to `level` of them, in either order.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level} is not one of {LEVELS}")
    while True:
        question = _draw_any(level, split, rng)
        if split_of(question) is split:
            return question


def draw_mixed(
    count: int, split: Split, rng: Random, mix: Mapping[int, float]
) -> tuple[Question, ...]:
    """Draw `count` questions independently, with levels as `mix` weighs them."""
    levels = rng.choices(tuple(mix), weights=tuple(mix.values()), k=count)
    return tuple(draw(level, split, rng) for level in levels)


def draw_distinct(
    count: int, split: Split, rng: Random, mix: Mapping[int, float] = TRAFFIC_MIX
) -> tuple[Question, ...]:
    """Draw a shuffled set of different questions with each level's share as in `mix`.

    A level that has too few questions gives what it has (level 1 has about ten in each held-out
    split), so the set may be a little smaller than `count`.
    """
    chosen: dict[str, Question] = {}
    for level, share in mix.items():
        wanted = len(chosen) + round(share * count)
        for _ in range(_tries(wanted - len(chosen))):
            if len(chosen) >= wanted:
                break
            question = _draw_any(level, split, rng)
            if split_of(question) is split:
                chosen.setdefault(question.prompt, question)
    questions = list(chosen.values())
    rng.shuffle(questions)
    return tuple(questions)


def by_level(questions: Sequence[Question]) -> dict[int, list[int]]:
    """Positions in `questions` of each level, levels ascending."""
    return {
        level: positions
        for level in LEVELS
        if (positions := [i for i, q in enumerate(questions) if q.level == level])
    }


def _tries(count: int) -> int:
    return 10 * SPLIT_BUCKETS * count + 5000


def _draw_any(level: int, split: Split, rng: Random) -> Question:
    """Draw a question of whatever split, in the proportions that suit `split`."""
    operands = [_operand(level, rng), _operand(rng.randint(1, level), rng)]
    rng.shuffle(operands)
    subtractions = TRAINING_SUBTRACTIONS if split is Split.TRAINING else 0.5
    operator = "-" if rng.random() < subtractions else "+"
    return ask(operands[0], operator, operands[1])


def _operand(digits: int, rng: Random) -> int:
    lowest = 0 if digits == 1 else 10 ** (digits - 1)
    return rng.randint(lowest, 10**digits - 1)
