"""Ways to place models, behind one seam: ours, and the simpler ones that it is compared with.

All of them scale by the same rules and differ in where a replica starts and what makes room for it.
ServerlessLLM's evaluation (arXiv 2401.14351, section 7.3) compares itself with a random scheduler
and with one that stops running requests where it would move them (after SHEPHERD).
"""

from enum import Enum

from gearfall.scheduling.baselines.baseline import DecideStep, simple_step
from gearfall.scheduling.baselines.baseline_rules import RULES
from gearfall.scheduling.reconcile import decide


class PlacementPolicy(Enum):
    """Which way a scheduler places."""

    OURS = "ours"
    """Soonest first token over all that wait, with eviction and live migration."""
    RANDOM = "random"
    """Any worker with room, else any whose idle replicas can leave."""
    LEAST_LOADED = "least-loaded"
    """The worker with the fewest replicas and jobs on its node."""
    LOCALITY = "locality"
    """Only where the bytes are nearest: waits for a worker there, moves nobody."""
    PREEMPT = "preempt"
    """Soonest start as ours; whoever runs there is stopped, not moved. Simulated only: a real
    worker finishes or moves the jobs of a replica that is taken back."""


REAL_POLICIES = tuple(
    policy.value for policy in PlacementPolicy if policy is not PlacementPolicy.PREEMPT
)
"""Names of those that a real cluster can follow."""


def decide_step(policy: PlacementPolicy, *, seed: int = 0) -> DecideStep:
    """Return the decision step of a policy; `seed` is for those that draw."""
    if policy is PlacementPolicy.OURS:
        return decide
    return simple_step(RULES[policy.value], seed)
