"""How a worker claims jobs of one model under the gears in force: its share, and what it waits for.

Shares say how the jobs of a model are spread over nodes; on a node they are spread evenly over the
replicas that are ready. Nodes without one are left out and the others' shares grow. Where several
plans name the model, the share is the mean over them and the trigger the lowest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gearfall.core.gears.gear_plan import Gear
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import ReplicaRecord, ReplicaState

MOST_WAIT_S = 0.05
"""No job is held longer than this for others to fill a batch; the planner simulates the same."""
MOST_WAIT_OF_P95 = 0.1
"""Nor longer than this share of the p95 that its gear promises."""


@dataclass(frozen=True, slots=True)
class ClaimRule:
    """What a worker keeps to while it claims."""

    share: float | None = None
    """Of the model's jobs, in [0, 1]; None: as many as come."""
    trigger: int = 1
    """Jobs that are waited for before an idle engine begins."""
    most_wait_s: float = 0.0
    """For those."""


def claim_rule(
    model: ModelName,
    worker_id: WorkerId,
    gears: Iterable[Gear],
    replicas: Iterable[ReplicaRecord],
) -> ClaimRule:
    """Return a worker's rule. `gears`: in force, one of each plan; `replicas`: of the model."""
    asking = [gear for gear in gears if any(stage.model == model for stage in gear.stages)]
    if not asking:
        return ClaimRule()
    ready = [each for each in replicas if each.state is ReplicaState.READY]
    found = (
        _share(gear.shares[model], worker_id, ready) for gear in asking if model in gear.shares
    )
    shares = [share for share in found if share is not None]
    return ClaimRule(sum(shares) / len(shares) if shares else None, *batch_rule(model, asking))


def batch_rule(model: ModelName, gears: Iterable[Gear]) -> tuple[int, float]:
    """Return how many jobs an idle engine waits for, and for how many seconds at most."""
    asking = [gear for gear in gears if any(stage.model == model for stage in gear.stages)]
    trigger = min((gear.triggers.get(model, 1) for gear in asking), default=1)
    if trigger == 1:
        return 1, 0.0
    waits_s = [MOST_WAIT_OF_P95 * gear.promise.p95_s for gear in asking if gear.promise.p95_s > 0]
    return trigger, min([MOST_WAIT_S, *waits_s])


def _share(
    by_node: dict[str, float], worker_id: WorkerId, ready: Sequence[ReplicaRecord]
) -> float | None:
    """Return a worker's share of what the live nodes get; None when none of them has any."""
    nodes: dict[NodeId, int] = {}
    for replica in ready:
        nodes[replica.node_id] = nodes.get(replica.node_id, 0) + 1
    live = sum(by_node.get(node, 0.0) for node in nodes)
    own = next((each.node_id for each in ready if each.worker_id == worker_id), None)
    if own is None or live <= 0.0:
        return None
    return by_node.get(own, 0.0) / live / nodes[own]
