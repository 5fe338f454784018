"""What cluster state holds of gear plans: plans, what routers want, what became of promises."""

from dataclasses import dataclass

from gearfall.core.ids import DeploymentName, RouterId


@dataclass(frozen=True, slots=True)
class GearPlanRecord:
    """The gear plan that a deployment follows; key `gear_plans/<name>`, no lease."""

    name: DeploymentName
    version: int
    content: str
    """The plan's file, as `gear_plan_checks.parse_plan` reads it."""
    deployed_unix_s: float = 0.0
    """Tells a plan from the same one deployed again; never falls."""


@dataclass(frozen=True, slots=True)
class GearVoteRecord:
    """The gear that one router wants; key `gear_votes/<name>/<router_id>`, router's lease.

    The highest vote for the plan's version is in force everywhere: up as soon as one router wants
    it, down when none needs it any more.
    """

    name: DeploymentName
    router_id: RouterId
    version: int
    """Of the plan that the gear belongs to."""
    gear: int
    tokens_per_s: float
    """That arrive at this router, smoothed."""
    queued_tokens: float
    """That wait at this router: prompts, and answers as long as they are expected to become."""


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """A promise of a gear plan that does not hold any more."""

    promise: str
    """agreement or escalation."""
    stage: int
    reason: str
    at_unix_s: float


@dataclass(frozen=True, slots=True)
class DriftRecord:
    """What became of one cascade of a plan in use; key `drift/<name>/<cascade>`, no lease.

    Written by whichever router notices first, heeded by all, deleted when a plan is deployed.
    """

    name: DeploymentName
    cascade: str
    """As `drift.cascade_name` writes it: with the thresholds that were planned."""
    version: int
    """Of the plan."""
    thresholds: tuple[float, ...]
    """In force, of each stage but the last; never below those planned."""
    times: int = 0
    """How often they were raised."""
    alarms: tuple[DriftAlarm, ...] = ()
    """The newest of each promise and stage."""
    deployed_unix_s: float = 0.0
    """Of the plan: what was found under one that was deployed before is void."""
