"""What a model that waits behind its own replicas was told, and for how long that is believed."""

from gearfall.scheduling.fleet.wants import Want
from gearfall.scheduling.placement.contention import Contender
from gearfall.scheduling.placement.queue_ahead import queue_ahead
from gearfall.scheduling.placement.room_making import EVICTION_S
from gearfall.scheduling.scene import least_start_s
from gearfall.scheduling.step import Step

_NEVER_S = float("inf")


def behind_own_s(step: Step, want: Want) -> float:
    """Return when a model's own replicas will have begun all that waits for it."""
    fleet, model = step.fleet, want.model.name
    waiting = fleet.index.waiting.get(model)
    if waiting is None or not want.may_queue:
        return _NEVER_S
    return queue_ahead(fleet.counted(model), waiting, step.now_unix_s).last_begins_s


def is_promise_kept(step: Step, want: Want, behind_s: float) -> bool:
    """Whether what waits begins when it was last said to, so that nowhere else need be looked at.

    Nothing starts sooner than from memory; where that is longer, no promise is needed. Patience
    ends both.
    """
    if not has_patience(step, want):
        return False
    promised_unix_s = step.fleet.promises.get(want.model.name, 0.0)
    least_s = least_start_s(step.scene, want.model)
    return behind_s <= max(least_s, promised_unix_s + EVICTION_S - step.now_unix_s)


def has_patience(step: Step, want: Want) -> bool:
    """Whether a model has waited for less than the policy's patience."""
    return step.now_unix_s < want.since_unix_s + step.scene.policy.patience_s


def promise(step: Step, contender: Contender) -> None:
    """Remember when the model's own replicas will have begun what waits."""
    promises, model = step.fleet.promises, contender.want.model.name
    begins_unix_s = step.now_unix_s + contender.behind_s
    # What is late by a little each time is late in the end.
    if begins_unix_s > promises.get(model, 0.0) + EVICTION_S or not contender.is_promised:
        promises[model] = begins_unix_s
    step.look_again(model, begins_unix_s + EVICTION_S)
