"""What a plan promises about agreement: how often an accepted answer is the last stage's too.

Measured as the routers measure it online (shadow share): of the answers that a stage accepts, the
share with the same text, by the profile's rule, as what the last stage answers to that query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gearfall.core.gears.gear_plan import Gear, GearPlan
from gearfall.core.records import AskedModel, Stage
from gearfall.gears.answers import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class KeyedAnswers:
    """One model's answers to the testing queries; one value a query."""

    certainty: FloatArray
    keys: npt.NDArray[np.str_]
    """Equal for equal texts."""


def with_agreement(
    plan: GearPlan, answers: Mapping[AskedModel, KeyedAnswers], rule: str
) -> GearPlan:
    """Return the plan with the agreement of each gear's stages, those of variants included.

    answers: by model as it is asked, to queries that chose nothing of the plan. Gears with a model
    that is not among them promise nothing about agreement.
    """
    variants = tuple(
        replace(each, gears=tuple(_promised(gear, answers) for gear in each.gears))
        for each in plan.variants
    )
    gears = tuple(_promised(gear, answers) for gear in plan.gears)
    return replace(plan, gears=gears, variants=variants, agreement_rule=rule)


def _promised(gear: Gear, answers: Mapping[AskedModel, KeyedAnswers]) -> Gear:
    if len(gear.stages) == 1 or any(stage.asked not in answers for stage in gear.stages):
        return gear
    found = agreement_of(gear.stages, answers)
    promise = replace(
        gear.promise,
        agreement=tuple(share for share, _ in found),
        accepted=tuple(count for _, count in found),
    )
    return replace(gear, promise=promise)


def agreement_of(
    stages: Sequence[Stage], answers: Mapping[AskedModel, KeyedAnswers]
) -> tuple[tuple[float | None, int], ...]:
    """Return (share that agrees with the last stage, answers accepted) of each stage but the last.

    The share is None where nothing is accepted.
    """
    last = answers[stages[-1].asked].keys
    there = np.ones(len(last), dtype=bool)
    found: list[tuple[float | None, int]] = []
    for stage in stages[:-1]:
        of = answers[stage.asked]
        accepted = there & (of.certainty >= (stage.threshold or 0.0))
        count = int(accepted.sum())
        share = float((of.keys[accepted] == last[accepted]).mean()) if count else None
        found.append((share, count))
        there &= ~accepted
    return tuple(found)
