"""What a profile says about answers, as the planner's columns: one number a query."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gearfall.core.certainty.calibration import Calibration, calibrated
from gearfall.core.certainty.certainty import measure_certainty
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import check_hold_tokens
from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile
from gearfall.gears.answers import ModelAnswers
from gearfall.gears.choice import LEARN_SHARE
from gearfall.gears.stoppable import fit_stoppable


def shuffled(profile: Profile, seed: int = 0) -> npt.NDArray[np.intp]:
    """Return the queries' places in random order; the same seed gives the same."""
    return np.random.default_rng(seed).permutation(len(profile.queries))


def learning(order: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the part that learns; what follows it in `order` tests."""
    return order[: int(len(order) * LEARN_SHARE)]


def fit_calibrations(profile: Profile, rows: Sequence[int]) -> dict[str, Calibration]:
    """Fit what can be fitted: models with log-probabilities, and right and wrong answers."""
    found = {}
    for model in profile.models:
        seen = [model.generations[at] for at in rows]
        if not all(each.logprobs for each in seen):
            continue
        right = np.array([each.quality for each in seen])
        try:
            found[model.name] = fit_stoppable(
                [each.logprobs for each in seen], [each.margins for each in seen], right
            )
        except InvalidRequest:
            # Too few answers of one kind: the plain measure stands, and the plan says so.
            continue
    return found


def beginnings(profile: Profile, hold_tokens: int) -> Profile:
    """Return the profile as it is when of each answer only the first tokens are looked at.

    0: all of them. Raises InvalidRequest where nothing is known of an answer's tokens; one that has
    none stays as it is.
    """
    if hold_tokens == 0:
        return profile
    check_hold_tokens(hold_tokens)
    for model in profile.models:
        if not all(each.logprobs or _is_empty(each) for each in model.generations):
            raise InvalidRequest(
                f"{model.name}: the profile has no log-probabilities of its tokens: nothing can be "
                "said about the beginnings of its answers; run `gearfall profile`",
                param="hold_tokens",
            )
    held = slice(0, hold_tokens)
    return replace(
        profile,
        models=tuple(
            replace(
                model,
                generations=tuple(
                    replace(each, logprobs=each.logprobs[held], margins=each.margins[held])
                    for each in model.generations
                ),
            )
            for model in profile.models
        ),
    )


def _is_empty(each: Generation) -> bool:
    """Whether it is known to have no tokens; imported ones that bring a certainty have a count of 0
    too."""
    return each.certainty is None and not each.output_tokens


def certainties_of(
    profile: Profile, calibrations: Mapping[str, Calibration], measure: str
) -> dict[str, list[float]]:
    """Return each model's certainty of each query, as the router would measure it."""
    return {
        model.name: [
            _certainty(each, calibrations.get(model.name), measure) for each in model.generations
        ]
        for model in profile.models
    }


def answers_of(
    profile: Profile, certainties: Mapping[str, Sequence[float]], *, hold_tokens: int = 0
) -> tuple[ModelAnswers, ...]:
    """Return what each model answered, in the profile's order of models and queries.

    hold_tokens: of an answer that goes up no more than so many are computed; 0: all may be.
    """
    return tuple(
        ModelAnswers(
            ModelName(model.name),
            np.array([each.quality for each in model.generations]),
            np.array(certainties[model.name]),
            np.array([each.cost for each in model.generations]),
            cost_up=(
                np.array([_begun_cost(each, hold_tokens) for each in model.generations])
                if hold_tokens
                else None
            ),
        )
        for model in profile.models
    )


def _begun_cost(each: Generation, tokens: int) -> float:
    """Return the cost of a prompt and the first tokens of its answer."""
    whole = max(1, each.prompt_tokens) + max(1, each.output_tokens)
    begun = max(1, each.prompt_tokens) + min(max(1, each.output_tokens), tokens)
    # Rounding may bring a whole answer's a hair above it.
    return min(each.cost, each.cost * begun / whole)


def _certainty(each: Generation, calibration: Calibration | None, measure: str) -> float:
    if each.certainty is not None:
        return each.certainty
    if calibration is not None:
        return calibrated(calibration, each.logprobs, each.margins)
    return measure_certainty(measure, each.logprobs, each.margins)
