"""Finds the demo's checkpoints, cascade and questions in the package, without torch."""

from pathlib import Path
from random import Random

from gearfall.demo.arithmetic import Question, Split, draw_distinct
from gearfall.demo.family import SIZES

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MODELS = tuple(SIZES)
"""Names of the models, smallest first."""


def checkpoint_path(model: str) -> Path:
    """Directory of a model's checkpoint; KeyError if the family has no such model."""
    return CHECKPOINTS / SIZES[model].name


def checkpoint_paths() -> dict[str, Path]:
    """Directory of every model's checkpoint by name, smallest model first."""
    return {model: checkpoint_path(model) for model in MODELS}


def deployment_path() -> Path:
    """The cascade that the evaluation chose: JSON with name, certainty and stages."""
    return CHECKPOINTS / "deployment.json"


def demo_questions(count: int, seed: int = 0) -> tuple[Question, ...]:
    """About `count` different questions, shuffled: none was trained on, none is planned from.

    Easy and hard ones are mixed as in the evaluation. The same count and seed give the same set;
    large counts may fall a little short, because there are few easy questions.
    """
    return draw_distinct(count, Split.TEST, Random(f"demo {seed}"))  # noqa: S311


def profile_questions(count: int) -> tuple[Question, ...]:
    """About `count` different questions to plan from: none was trained on, none is in the test."""
    return draw_distinct(count, Split.CALIBRATION, Random("demo profile"))  # noqa: S311
