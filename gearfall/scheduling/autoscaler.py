"""How many replicas a model should have: demand up, keep-alive down, never thrashing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord
from gearfall.scheduling.autoscaler_load import ModelLoad, stable_jobs
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, Waiting

UNKNOWN_SLOTS = 16
"""Jobs at once that a replica is taken to run before its first record says."""


@dataclass(frozen=True, slots=True)
class SchedulerPolicy:
    """What an operator sets for the whole cluster."""

    keep_alive_s: float = 300.0
    """Idle time before a replica is given back, for models that no deployment names."""
    min_residency_s: float = 0.25
    """A replica that became ready stays at least this long whatever waits for its room."""
    residency_per_start: float = 10.0
    """It also stays this many times as long as its start took: what thrashing may cost at most."""
    patience_s: float = 20.0
    """A model that waited this long may take the room of a busy one."""
    failing_stay_s: float = 60.0
    """A replica that does not start is given back at the earliest after this time."""
    target_utilisation: float = 0.7
    """Share of its slots that a replica's jobs may take before another one is started, where no
    deployment sets a target."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """How many replicas one model may have and how long an idle one stays."""

    min_replicas: int
    max_replicas: int
    keep_alive_s: float
    target_jobs: int = 0
    """Jobs that one replica should run at once; 0: a share of its slots."""
    target_queued_tokens: int = 0
    """Tokens to compute that may wait for one replica; 0: no such target."""


def limits_by_model(
    models: Iterable[ModelName],
    deployments: Mapping[DeploymentName, DeploymentRecord],
    policy: SchedulerPolicy,
) -> dict[ModelName, ModelLimits]:
    """Return each model's limits: the largest of all deployments that name it, else defaults.

    Of targets the smallest that is set.
    """
    found: dict[ModelName, ModelLimits] = {}
    for deployment in deployments.values():
        for stage in deployment.stages:
            known = found.get(stage.model, ModelLimits(0, 1, 0.0))
            found[stage.model] = ModelLimits(
                max(known.min_replicas, deployment.min_replicas),
                max(known.max_replicas, deployment.max_replicas, deployment.min_replicas),
                max(known.keep_alive_s, deployment.keep_alive_s),
                _stricter(known.target_jobs, deployment.target_jobs),
                _stricter(known.target_queued_tokens, deployment.target_queued_tokens),
            )
    default = ModelLimits(0, 1, policy.keep_alive_s)
    return {model: found.get(model, default) for model in models}


def _stricter(one: int, other: int) -> int:
    """Return the smaller of two targets, of which 0 is none."""
    return min(one, other) if one and other else one or other


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """What one model should have."""

    missing: int
    """Replicas to add."""
    surplus: tuple[tuple[ReplicaKey, str], ...]
    """Replicas to give back, with the reason."""
    next_due_unix_s: float | None
    """When this decision has to be made again though nothing changed."""


def scale_model(
    hosted: tuple[Hosted, ...],
    waiting: Waiting | None,
    limits: ModelLimits,
    load: ModelLoad,
    *,
    policy: SchedulerPolicy,
    now_unix_s: float,
) -> ScaleDecision:
    """Compare what a model has with what it needs. A model with demand is never scaled down.

    `load` is advanced up to `now_unix_s`.
    """
    by_load = _wanted_by_load(hosted, limits, load, policy, now_unix_s)
    if waiting is not None:
        needed = max(_needed_by_demand(hosted, waiting), by_load)
        return ScaleDecision(_missing(hosted, needed, limits), (), None)
    missing = _missing(hosted, by_load if hosted else 0, limits)
    due_by_key = {h.key: _release_due(h, limits, policy) for h in hosted if h.is_idle}
    oldest_first = sorted(due_by_key, key=lambda key: (due_by_key[key], key))
    spare = len(hosted) - limits.min_replicas
    surplus = [
        (key, f"idle for its keep-alive of {limits.keep_alive_s:g} s")
        for key in oldest_first[: max(0, spare)]
        if due_by_key[key] <= now_unix_s
    ]
    surplus += _beyond_most(hosted, oldest_first, limits, {key for key, _ in surplus})
    gone = {key for key, _ in surplus}
    pending = [due for key, due in due_by_key.items() if key not in gone and due > now_unix_s]
    can_shrink = len(hosted) - len(gone) > limits.min_replicas
    return ScaleDecision(missing, tuple(surplus), min(pending) if pending and can_shrink else None)


def _missing(hosted: tuple[Hosted, ...], needed: int, limits: ModelLimits) -> int:
    wanted = max(limits.min_replicas, min(limits.max_replicas, needed))
    return max(0, wanted - len(hosted))


def _slots(hosted: tuple[Hosted, ...]) -> int:
    return max(1, max((h.replica.slots for h in hosted if h.replica), default=UNKNOWN_SLOTS))


def _needed_by_demand(hosted: tuple[Hosted, ...], waiting: Waiting) -> int:
    """Return how many replicas the waiting jobs need; the first has to show that it starts."""
    if not hosted:
        return 1
    return sum(h.is_ready for h in hosted) + math.ceil(waiting.jobs / _slots(hosted))


def _wanted_by_load(
    hosted: tuple[Hosted, ...],
    limits: ModelLimits,
    load: ModelLoad,
    policy: SchedulerPolicy,
    now_unix_s: float,
) -> int:
    """Return how many replicas the jobs at hand need so that none of them has to wait."""
    if load.jobs <= 0:
        return 0
    target_jobs = float(limits.target_jobs) or policy.target_utilisation * _slots(hosted)
    return math.ceil(stable_jobs(load, now_unix_s) / target_jobs)


def _beyond_most(
    hosted: tuple[Hosted, ...],
    oldest_first: list[ReplicaKey],
    limits: ModelLimits,
    gone: set[ReplicaKey],
) -> list[tuple[ReplicaKey, str]]:
    excess = len(hosted) - len(gone) - limits.max_replicas
    busy = sorted(h.key for h in hosted if not h.is_idle)
    left = [key for key in (*oldest_first, *busy) if key not in gone]
    reason = f"more than max_replicas = {limits.max_replicas}"
    return [(key, reason) for key in left[: max(0, excess)]]


def _release_due(hosted: Hosted, limits: ModelLimits, policy: SchedulerPolicy) -> float:
    assert hosted.replica is not None
    idle_end = hosted.replica.idle_since_unix_s + limits.keep_alive_s
    return max(idle_end, _rested(hosted, policy))


def _rested(hosted: Hosted, policy: SchedulerPolicy) -> float:
    """Return when a replica has stayed long enough to have been worth its start."""
    stay_s = max(policy.min_residency_s, policy.residency_per_start * hosted.start_s)
    return hosted.assignment.assigned_unix_s + hosted.start_s + stay_s


def evictable_at(
    hosted: Hosted,
    *,
    has_demand: bool,
    spare: bool,
    wanted_since_unix_s: float,
    policy: SchedulerPolicy,
) -> float | None:
    """Return from when another model's demand may take this replica's room; None for never.

    `spare`: the model would keep its min_replicas. An idle replica goes after its minimum
    residency, a busy one when the other also waited out the policy's patience, and finishes first.
    """
    if has_demand or not spare:
        return None
    rested = _rested(hosted, policy)
    if hosted.is_idle:
        return rested
    return max(rested, wanted_since_unix_s + policy.patience_s) if hosted.is_ready else None
