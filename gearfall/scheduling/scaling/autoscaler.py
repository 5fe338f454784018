"""How many replicas a model should have: demand and load up, keep-alive and quiet down.

Up, the largest of
- demand: the replicas that are ready and as many as the waiting jobs fill, and enough that no more
  tokens wait for each than the deployment's target;
- usual load: jobs at once over the stable window / what one replica should run;
- panic: while a burst of at least `panic_threshold` times what the usual load's replicas should
  run is remembered, the burst's peak / what one replica should run.

Down, only while nothing waits, and never below what usual load or panic ask for beyond one:
- an idle replica after its minimum residency and its keep-alive,
  min(keep_alive_s, keep_alive_per_start x come_back_s), where come_back_s is what its own start
  took without what happens only once;
- a busy one when fewer would have done for all of the remembered time: that with the fewest jobs,
  if the others have slots for them. Its worker moves them there alive.
"""

import math
from dataclasses import dataclass, field

from gearfall.scheduling.scaling.autoscaler_limits import (
    ModelLimits,
    SchedulerPolicy,
    limits_by_model,
)
from gearfall.scheduling.scaling.autoscaler_load import (
    ModelLoad,
    peak_changes_at,
    peak_jobs,
    stable_below_at,
    stable_jobs,
)
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, Waiting

__all__ = [
    "ModelLimits",
    "ScaleDecision",
    "SchedulerPolicy",
    "evictable_at",
    "keep_alive_s",
    "limits_by_model",
    "scale_model",
]

UNKNOWN_SLOTS = 16
"""Jobs at once that a replica is taken to run before its first record says."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """What one model should have."""

    missing: int
    """Replicas to add."""
    surplus: tuple[tuple[ReplicaKey, str], ...]
    """Replicas to give back, with the reason."""
    next_due_unix_s: float | None
    """When this decision has to be made again though nothing changed."""
    firm: int = 0
    """Of the missing, those wanted even if the replicas there are would serve what waits sooner
    than a new one: by min_replicas, by a deployment's targets, by the usual load."""


def scale_model(
    hosted: tuple[Hosted, ...],
    waiting: Waiting | None,
    limits: ModelLimits,
    load: ModelLoad,
    *,
    policy: SchedulerPolicy,
    now_unix_s: float,
    kept: frozenset[ReplicaKey] = frozenset(),
) -> ScaleDecision:
    """Compare what a model has with what it needs. A model with demand is never scaled down.

    `load` was advanced at `now_unix_s` or before; nothing changed since. `kept`: replicas that stay
    whatever comes, as gear plans want them.
    """
    scale = _Scale(hosted, limits, load, policy, now_unix_s, kept)
    if waiting is not None:
        needed = max(scale.needed_by(waiting), scale.wanted_by_load())
        missing = scale.missing(needed)
        firm = min(missing, scale.missing(scale.firmly_needed(waiting)))
        return ScaleDecision(missing, (), None, firm)
    missing = scale.missing(scale.wanted_by_load())
    surplus = () if missing else scale.surplus()
    due = [at for at in scale.due_unix_s if at > now_unix_s]
    return ScaleDecision(missing, surplus, min(due, default=None), missing)


def keep_alive_s(hosted: Hosted, limits: ModelLimits, policy: SchedulerPolicy) -> float:
    """Return how long a replica is kept idle: as its limits say while its start is not known."""
    if hosted.come_back_s <= 0.0:
        return limits.keep_alive_s
    return min(limits.keep_alive_s, policy.keep_alive_per_start * hosted.come_back_s)


@dataclass(slots=True)
class _Scale:
    """Working state of one call of `scale_model`."""

    hosted: tuple[Hosted, ...]
    limits: ModelLimits
    load: ModelLoad
    policy: SchedulerPolicy
    now_unix_s: float
    kept: frozenset[ReplicaKey] = frozenset()
    due_unix_s: list[float] = field(default_factory=list)
    target_jobs: float = field(init=False)

    def __post_init__(self) -> None:
        share = self.policy.target_utilisation * self._slots()
        self.target_jobs = float(self.limits.target_jobs) or max(1.0, share)

    def missing(self, needed: int) -> int:
        """Return how many replicas to add when `needed` are."""
        wanted = max(self.limits.min_replicas, min(self.limits.max_replicas, needed))
        return max(0, wanted - len(self.hosted))

    def needed_by(self, waiting: Waiting) -> int:
        """Return how many replicas waiting jobs need; the first has to show that it starts."""
        if not self.hosted:
            return 1
        ready = sum(each.is_ready for each in self.hosted)
        needed = ready + math.ceil(waiting.jobs / self._slots())
        return max(needed, self._needed_by_tokens(waiting))

    def firmly_needed(self, waiting: Waiting) -> int:
        """Return how many replicas are needed though what waits may be served before they start."""
        jobs = stable_jobs(self.load, self.now_unix_s) if self.load.jobs > 0 else 0.0
        held = self.wanted_by_load() if self.limits.target_jobs else self._replicas_for(jobs)
        return max(1, held, self._needed_by_tokens(waiting))

    def _needed_by_tokens(self, waiting: Waiting) -> int:
        most_tokens = self.limits.target_queued_tokens
        return math.ceil(waiting.tokens / most_tokens) if most_tokens else 0

    def wanted_by_load(self) -> int:
        """Return how many replicas the jobs at hand want, so that none has to wait."""
        return self._held() if self.hosted and self.load.jobs > 0 else 0

    def surplus(self) -> tuple[tuple[ReplicaKey, str], ...]:
        """Return what is to be given back, and note when to look again."""
        gone = self._expired()
        gone += self._beyond_most({key for key, _ in gone})
        return tuple(gone) if gone else self._quiet()

    def _slots(self) -> int:
        slots = (each.replica.slots for each in self.hosted if each.replica)
        return max(1, max(slots, default=UNKNOWN_SLOTS))

    def _held(self) -> int:
        """Return how many replicas usual load and panic ask for."""
        usual = self._replicas_for(stable_jobs(self.load, self.now_unix_s))
        peak = peak_jobs(self.load, self.now_unix_s)
        is_panic = peak >= self.policy.panic_threshold * self.target_jobs * max(1, usual)
        return max(usual, self._replicas_for(peak)) if is_panic else usual

    def _replicas_for(self, jobs: float) -> int:
        return math.ceil(jobs / self.target_jobs - _ROUNDING)

    def _floor(self) -> int:
        """Return below how many nothing idle is given back."""
        held = min(self._held(), self.limits.max_replicas, len(self.hosted))
        return max(self.limits.min_replicas, held if held > 1 else 0)

    def _expired(self) -> list[tuple[ReplicaKey, str]]:
        """Return idle replicas whose keep-alive is over."""
        gone: list[tuple[ReplicaKey, str]] = []
        idle = self._idle()
        floor = self._floor() if idle else 0
        for due_unix_s, each in idle:
            if due_unix_s > self.now_unix_s:
                if len(self.hosted) - len(gone) > self.limits.min_replicas:
                    self.due_unix_s.append(due_unix_s)
                break
            if len(self.hosted) - len(gone) <= floor:
                self._wait_for_less(len(self.hosted) - len(gone) - 1)
                break
            kept_s = keep_alive_s(each, self.limits, self.policy)
            gone.append((each.key, f"idle for its keep-alive of {kept_s:g} s"))
        return gone

    def _idle(self) -> list[tuple[float, Hosted]]:
        """Return idle replicas with when each may go, the earliest first."""
        idle = [each for each in self.hosted if each.is_idle and each.key not in self.kept]
        dues = [(self._release_due(each), each) for each in idle]
        return sorted(dues, key=lambda due: (due[0], due[1].key))

    def _release_due(self, each: Hosted) -> float:
        assert each.replica is not None
        idle_end = each.replica.idle_since_unix_s + keep_alive_s(each, self.limits, self.policy)
        return max(idle_end, _rested(each, self.policy))

    def _beyond_most(self, gone: set[ReplicaKey]) -> list[tuple[ReplicaKey, str]]:
        excess = len(self.hosted) - len(gone) - self.limits.max_replicas
        if excess <= 0:
            return []
        stay = self.kept
        busy = sorted(each.key for each in self.hosted if not (each.is_idle or each.key in stay))
        idle = [each.key for _, each in self._idle()]
        left = [key for key in (*idle, *busy) if key not in gone]
        reason = f"more than max_replicas = {self.limits.max_replicas}"
        return [(key, reason) for key in left[:excess]]

    def _quiet(self) -> tuple[tuple[ReplicaKey, str], ...]:
        """Return the replica that others can do without, when all are busy and none is new."""
        if not self.load.is_known or any(e.is_idle or not e.is_ready for e in self.hosted):
            return ()
        peak = max(peak_jobs(self.load, self.now_unix_s), float(self.load.jobs))
        enough = max(1, self.limits.min_replicas, self._replicas_for(peak))
        if len(self.hosted) <= enough:
            if len(self.hosted) > max(1, self.limits.min_replicas):
                self._wait_for_less(len(self.hosted) - 1)
            return ()
        others = [each for each in self.hosted if each.key not in self.kept]
        if not others:
            return ()
        least = min(others, key=lambda each: (each.running_jobs, each.key))
        others_room = sum(e.free_slots for e in self.hosted if e is not least)
        rested_unix_s = _rested(least, self.policy)
        if rested_unix_s > self.now_unix_s:
            self.due_unix_s.append(rested_unix_s)
            return ()
        if others_room < least.running_jobs:
            return ()
        return ((least.key, f"{peak:.3g} jobs at once lately need {enough} replicas"),)

    def _wait_for_less(self, replicas: int) -> None:
        """Note when the load may have come down to what `replicas` do."""
        jobs = max(1, replicas) * self.target_jobs
        ats = (
            peak_changes_at(self.load, self.now_unix_s),
            stable_below_at(self.load, jobs, self.now_unix_s),
        )
        self.due_unix_s += [at for at in ats if at is not None]


def _rested(hosted: Hosted, policy: SchedulerPolicy) -> float:
    """Return when a replica has stayed long enough to have been worth its start."""
    stay_s = max(policy.min_residency_s, policy.residency_per_start * hosted.return_s)
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
    One whose own jobs wait goes when the other would starve: models that can't fit together take
    turns, each for its minimum residency at least.
    """
    if not spare:
        return None
    rested = _rested(hosted, policy)
    if has_demand:
        starved = wanted_since_unix_s + policy.starvation_s
        return max(rested, starved) if hosted.is_ready else None
    if hosted.is_idle:
        return rested
    return max(rested, wanted_since_unix_s + policy.patience_s) if hosted.is_ready else None
