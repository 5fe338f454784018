"""Made-up answers for the tests of the planner."""

import numpy as np

from gearfall.core.ids import ModelName
from gearfall.gears.answers import ModelAnswers


def answers(name, correct, certainty, cost=1.0) -> ModelAnswers:
    count = len(correct)
    return ModelAnswers(
        ModelName(name),
        np.asarray(correct, dtype=np.float64),
        np.asarray(certainty, dtype=np.float64),
        np.full(count, cost) if np.isscalar(cost) else np.asarray(cost, dtype=np.float64),
    )


def family(count: int, seed: int, *, graded: bool = False) -> list[ModelAnswers]:
    """Three models, each better and dearer than the one before, whose certainty is telling."""
    random = np.random.default_rng(seed)
    hardness = random.random(count)
    found = []
    for number, (skill, cost) in enumerate(((0.6, 1.0), (0.75, 5.0), (0.88, 20.0))):
        chance = np.clip(skill + 0.3 - 0.6 * hardness + 0.1 * random.standard_normal(count), 0, 1)
        quality = (random.random(count) < chance).astype(float)
        found.append(
            answers(f"m{number}", (quality + chance) / 2 if graded else quality, chance, cost)
        )
    return found
