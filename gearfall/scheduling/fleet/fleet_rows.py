"""One worker's numbers and victims, made from the records."""

from typing import NamedTuple

from gearfall.core.origin import bandwidth_out_of
from gearfall.core.records import NodeRecord, WorkerRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.fleet.victims import Victim, VictimKind, victim_of
from gearfall.scheduling.fleet.worker_rows import WorkerRow
from gearfall.scheduling.snapshot import Hosted, ReplicaKey


class NodeFigures(NamedTuple):
    """What the rows of all workers of a node have in common."""

    pool_bytes: float = 0.0
    remote_s_per_byte: float = 0.0
    remote_queued_s: float = 0.0
    ssd_s_per_byte: float = 0.0
    ssd_queued_s: float = 0.0


def row_of(
    fleet: FleetState, worker: WorkerRecord, figures: NodeFigures | None, now_unix_s: float
) -> tuple[WorkerRow, tuple[Victim, ...], float | None]:
    """Return a worker's row, its victims, and when the row changes though nothing happens.

    `figures`: of its node; None while the node's store is not there.
    """
    records, worker_id = fleet.records, worker.worker_id
    used = leaving = idle = busy = 0
    held = leaving_replicas = idle_replicas = busy_replicas = 0
    victims: list[Victim] = []
    due: list[float] = []
    for model in sorted(fleet.index.held.get(worker_id, ())):
        key = (worker_id, model)
        size_bytes = records.reserved_bytes(key)
        used += size_bytes
        held += 1
        if key not in records.assignments:
            leaving += size_bytes
            leaving_replicas += 1
            continue
        victim = _victim(fleet, key, size_bytes)
        if victim is None:
            continue
        victims.append(victim)
        is_rested = victim.rested_unix_s <= now_unix_s
        if not is_rested and victim.kind is not VictimKind.COMING:
            due.append(victim.rested_unix_s)
        if is_rested and victim.is_cheap:
            idle += size_bytes
            idle_replicas += 1
        else:
            busy += size_bytes
            busy_replicas += 1
    claims = fleet.claims.on(worker_id)
    free_bytes = worker.memory_bytes - used - sum(claims.values())
    free_replicas = worker.max_replicas - held - len(claims)
    takes = figures is not None and worker.max_replicas > 0 and worker_id not in records.unreachable
    soon, soon_replicas = leaving + idle, leaving_replicas + idle_replicas
    row = WorkerRow(
        free_bytes,
        free_replicas * takes,
        free_bytes + soon,
        (free_replicas + soon_replicas) * takes,
        free_bytes + soon + busy,
        (free_replicas + soon_replicas + busy_replicas) * takes,
        used,
        *(figures or NodeFigures()),
        worker.slots,
        fleet.rows.number_of_node(worker.node_id),
    )
    return row, tuple(victims), min(due, default=None)


def _victim(fleet: FleetState, key: ReplicaKey, size_bytes: int) -> Victim | None:
    if fleet.model(key[1]) is None:
        return None
    hosted, flags = fleet.index.hosted[key[1]][key], fleet.flags[key[1]]
    first = key
    if group := hosted.assignment.group:
        # Only the first of a group says how the replica is, and is named where it is kept.
        first = (group[0], key[1])
        hosted = Hosted(hosted.assignment, fleet.records.replicas.get(first))
    return victim_of(
        hosted,
        fleet.index.waiting.get(key[1]),
        size_bytes,
        spare=flags.is_spare and first not in flags.kept,
        policy=fleet.policy,
    )


def node_figures(fleet: FleetState, node: NodeRecord) -> NodeFigures:
    """Return a live node's figures."""
    queued_bytes = {Tier.REMOTE: 0, Tier.SSD: 0, Tier.DRAM: 0}
    for name in fleet.loading_on(node.node_id):
        model = fleet.model(name)
        tier = fleet.source_tier(model, node.node_id) if model else None
        if model and tier:
            queued_bytes[tier] += model.size_bytes
    remote_s = 1.0 / bandwidth_out_of(Tier.REMOTE, node).bytes_per_s
    ssd_s = 1.0 / bandwidth_out_of(Tier.SSD, node).bytes_per_s
    return NodeFigures(
        node.dram_capacity_bytes,
        remote_s,
        remote_s * queued_bytes[Tier.REMOTE],
        ssd_s,
        ssd_s * queued_bytes[Tier.SSD],
    )
