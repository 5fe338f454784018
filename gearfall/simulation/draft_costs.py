"""What wrong drafts cost the models that verify them, as the planner's columns have it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gearfall.core.profile import Generation, Profile
from gearfall.gears.answers import FloatArray, ModelAnswers
from gearfall.simulation.answers import shared_tokens, tokens_of


def with_draft_costs(
    columns: Sequence[ModelAnswers], profile: Profile, hold_tokens: int
) -> tuple[ModelAnswers, ...]:
    """Return the columns with what each model spends on the drafts that come up to it.

    A draft is a whole answer, or its first `hold_tokens` tokens unless that is 0; those that the
    model would not have said are computed in vain, by each answer that it is asked for. Stopped
    early it is shorter, so that this is the most. Nothing goes up where tokens are unknown.
    """
    answers = {model.name: model.generations for model in profile.models}
    return tuple(
        replace(
            above,
            wrong_drafts={
                below.asked: _wrong_costs(
                    answers[below.model], answers[above.model], hold_tokens or None
                )
                * (above.several.samples if above.several else 1)
                for below in columns
                if below.model != above.model
            },
        )
        for above in columns
    )


def _wrong_costs(
    below: Sequence[Generation], above: Sequence[Generation], most_tokens: int | None
) -> FloatArray:
    found = []
    for lower, upper in zip(below, above, strict=True):
        draft = tokens_of(lower)[:most_tokens]
        wrong = len(draft) - shared_tokens(draft, tokens_of(upper))
        whole = max(1, upper.prompt_tokens) + max(1, upper.output_tokens)
        found.append(upper.cost * wrong / whole)
    return np.array(found)
