"""What operators set about replicas: for the whole cluster, and for one model by deployments."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy


@dataclass(frozen=True, slots=True)
class SchedulerPolicy:
    """What an operator sets for the whole cluster."""

    keep_alive_s: float = 300.0
    """Idle time before a replica is given back, at most, for models that no deployment names."""
    keep_alive_per_start: float = 600.0
    """A replica is kept idle for this many times as long as it would take to come back, up to its
    model's keep-alive: what is cheap to bring back goes early."""
    min_residency_s: float = 0.25
    """A replica that became ready stays at least this long whatever waits for its room."""
    residency_per_start: float = 1.0
    """It also stays this many times as long as it takes to come back from memory, where its bytes
    stay for now: what thrashing may cost at most."""
    patience_s: float = 20.0
    """A model that waited this long may take the room of a busy one."""
    starvation_s: float = 60.0
    """One that waited this long may take it though the other's jobs wait as well."""
    failing_stay_s: float = 60.0
    """A replica that does not start is given back at the earliest after this time."""
    target_utilisation: float = 0.7
    """Share of its slots that a replica's jobs may take before another one is started, where no
    deployment sets a target."""
    panic_threshold: float = 2.0
    """A burst of this many times what the usual load's replicas should run is followed at once,
    and nothing is scaled down while it is remembered."""
    gear_shift_s: float = 1.0
    """What a shift to the next gear may take: a model of that gear which starts slower is up before
    the gear is in force."""
    prefetch: PrefetchPolicy | None = field(default_factory=PrefetchPolicy)
    """When models are fetched ahead of anybody's asking; None for never."""


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
