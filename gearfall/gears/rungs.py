"""The cascades that a plan may use, from the best to the cheapest, with what is certain of each.

Without a target of quality every cascade gets a lower bound, and all bounds hold together (each has
an equal share of delta). With one, cascades are tested against it one after the other, the safest
first, each at level delta, until the first that can't be rejected (fixed-sequence testing, as in
`certificate`): all that were accepted keep the target together. Which cascades there are and in
which order they are tested follows from queries that test nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gearfall.core.errors import InvalidRequest
from gearfall.core.records import AskedModel, Stage
from gearfall.gears.answers import MIN_QUERIES, FloatArray, ModelAnswers, check_answers
from gearfall.gears.betting import loss_bound, loss_p_value
from gearfall.gears.certificate import lower_bound, p_value
from gearfall.gears.choice import LEARN_SHARE, MAX_PATH, SLACK, spread, thinned
from gearfall.gears.search import Cascade, evaluate, front, replay

WARIER = (0.8, 0.6, 0.4, 0.2)
"""Of what the best cascade's stages accept, steps towards asking the last model always. The best
cascade of a few hundred queries is partly luck: where it turns out not to keep a target, these do,
and cost less than the best model alone."""
MAX_CASCADES = 20
"""Rungs between the best cascade and the cheapest where there is no target of quality. Each costs
so many times less than the one before: steps of the same size would leave none between models."""


@dataclass(frozen=True, slots=True)
class QualityTarget:
    """What a plan's cascades have to keep; None: nothing."""

    quality: float | None
    """Share of right answers."""
    loss: float | None
    """Quality that may be lost against the best model."""
    delta: float


@dataclass(frozen=True, slots=True)
class Rung:
    """One cascade with what is known of it on the testing queries."""

    cascade: Cascade
    bound: float
    """Quality that is certified; 0 where nothing was asked of it."""
    loss_bound: float | None
    """Loss against the best model that is certified, where it was asked for."""
    queries: int


def find_rungs(
    answers: Sequence[ModelAnswers], order: npt.NDArray[np.intp], target: QualityTarget
) -> tuple[Rung, ...]:
    """Return the cascades to choose from, best first.

    order: a random permutation of the queries; its first part learns, the rest tests. Raises
    InvalidRequest for senseless answers or targets, and for a target that the data can't certify.
    """
    models = check_answers(answers)
    _check(target)
    learning = int(len(order) * LEARN_SHARE)
    if learning < MIN_QUERIES:
        raise InvalidRequest(
            f"{len(order)} queries: {LEARN_SHARE:.0%} of them choose cascades, the rest certifies; "
            f"measure at least {math.ceil(MIN_QUERIES / LEARN_SHARE)}",
            param="queries",
        )
    learn = {each.asked: each.take(order[:learning]) for each in models}
    test = {each.asked: each.take(order[learning:]) for each in models}
    if target.quality is None and target.loss is None:
        return _bounded(_ladder(learn), test, target.delta)
    return _tested(learn, test, target)


def _ladder(learn: Mapping[AskedModel, ModelAnswers]) -> list[Cascade]:
    """Return cascades of the front evenly by the logarithm of cost, and each model alone.

    A model alone may be quicker than a cascade that is as good and computes less.
    """
    falling = tuple(reversed(front(tuple(learn.values()))))
    path = list(spread(falling, np.log([each.cost for each in falling]), MAX_CASCADES))
    known = {each.stages for each in path}
    alone = [evaluate([answers], ()) for answers in learn.values() if not answers.several]
    path += [each for each in alone if each.stages not in known]
    return sorted(path, key=lambda each: (-each.quality, each.cost))


def _bounded(
    path: Sequence[Cascade], test: Mapping[AskedModel, ModelAnswers], delta: float
) -> tuple[Rung, ...]:
    found = []
    for cascade in path:
        quality = _quality(cascade, test)
        bound = lower_bound(quality, delta / len(path))
        found.append(Rung(_measured(cascade, test), bound, None, len(quality)))
    return tuple(found)


def _tested(
    learn: Mapping[AskedModel, ModelAnswers],
    test: Mapping[AskedModel, ModelAnswers],
    target: QualityTarget,
) -> tuple[Rung, ...]:
    singly = [asked for asked in learn if asked[1] is None]
    best = max(singly, key=lambda asked: (float(learn[asked].correct.mean()), asked[0]))
    accepted = []
    path = _path(learn, best, target)
    for cascade in path:
        if _p_value(cascade, test, best, target) > target.delta:
            break
        accepted.append(_measured(cascade, test))
    queries = test[best].count
    if not accepted:
        raise _refusal(path[0], test, best, target)
    accepted.sort(key=lambda each: (-each.quality, each.cost))
    return tuple(
        Rung(each, target.quality or 0.0, target.loss, queries)
        for each in accepted
        if len(each.stages) == 1 or not _is_beaten(each, accepted)
    )


def _is_beaten(cascade: Cascade, others: Sequence[Cascade]) -> bool:
    """Whether another is as good and cheaper. A model alone may be quicker all the same."""
    return any(other.quality >= cascade.quality and other.cost < cascade.cost for other in others)


def _path(
    learn: Mapping[AskedModel, ModelAnswers], best: AskedModel, target: QualityTarget
) -> list[Cascade]:
    """Return the cascades to test, the safest first: the best model loses nothing to itself.

    Of equally safe ones the dearer: it asks the last model more often.
    """
    alone = evaluate([learn[best]], ())
    floor = max(target.quality or 0.0, 0.0 if target.loss is None else alone.quality - target.loss)
    hopeful = [each for each in front(tuple(learn.values())) if each.quality >= floor - SLACK]
    path = [each for each in thinned(hopeful, MAX_PATH) if each.stages != alone.stages]
    path += [_warier(path[0], learn, share) for share in WARIER] if path else []
    path.append(alone)
    path.sort(key=lambda each: (_p_value(each, learn, best, target), -each.cost))
    if target.quality is None:
        path.sort(key=lambda each: each is not alone)
    return path


def _warier(cascade: Cascade, learn: Mapping[AskedModel, ModelAnswers], share: float) -> Cascade:
    """Return the cascade with stages that accept only that share of what they would accept."""
    limits = []
    for stage, limit in zip(cascade.stages, _limits(cascade.stages), strict=False):
        certainty = learn[stage.asked].certainty
        accepted = float(np.mean(certainty >= limit))
        limits.append(max(limit, float(np.quantile(certainty, 1.0 - accepted * share))))
    return evaluate(_models(cascade.stages, learn), limits)


def _p_value(
    cascade: Cascade,
    answers: Mapping[AskedModel, ModelAnswers],
    best: AskedModel,
    target: QualityTarget,
) -> float:
    """Return the p-value of "some part of the target is missed"."""
    quality = _quality(cascade, answers)
    found = [0.0]
    if target.quality is not None:
        found.append(p_value(quality, target.quality))
    if target.loss is not None:
        found.append(loss_p_value(quality, answers[best].correct, target.loss, target.delta))
    return max(found)


def _quality(cascade: Cascade, answers: Mapping[AskedModel, ModelAnswers]) -> FloatArray:
    return replay(_models(cascade.stages, answers), _limits(cascade.stages))[1]


def _measured(cascade: Cascade, answers: Mapping[AskedModel, ModelAnswers]) -> Cascade:
    return evaluate(_models(cascade.stages, answers), _limits(cascade.stages))


def _models(
    stages: Sequence[Stage], answers: Mapping[AskedModel, ModelAnswers]
) -> list[ModelAnswers]:
    return [answers[stage.asked] for stage in stages]


def _limits(stages: Sequence[Stage]) -> list[float]:
    return [stage.threshold for stage in stages if stage.threshold is not None]


def _check(target: QualityTarget) -> None:
    for name, value in (("quality", target.quality), ("loss", target.loss)):
        if value is not None and not 0.0 < value < 1.0:
            raise InvalidRequest(f"{name} {value:g}: between 0 and 1", param=name)
    if not 0.0 < target.delta < 1.0:
        raise InvalidRequest(f"delta {target.delta:g}: between 0 and 1", param="delta")


def _refusal(
    safest: Cascade,
    test: Mapping[AskedModel, ModelAnswers],
    best: AskedModel,
    target: QualityTarget,
) -> InvalidRequest:
    """Return what to say when not even the safest cascade certifies the target."""
    quality, said = _quality(safest, test), []
    if target.quality is not None:
        highest = lower_bound(quality, target.delta)
        said.append(f"a quality of {highest:.4f} at most, not {target.quality:g}")
    if target.loss is not None:
        lowest = loss_bound(quality, test[best].correct, target.delta)
        said.append(f"a loss of {lowest:.4f} at least, not {target.loss:g}")
    return InvalidRequest(
        f"{len(quality)} queries certify {' and '.join(said)}, with delta {target.delta:g}. Relax "
        "the target, allow a larger delta, or measure more queries",
        param="loss" if target.quality is None else "quality",
    )
