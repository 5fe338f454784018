"""How one worker gets room for a model: it has it, somebody goes, moves, or ends first."""

from dataclasses import dataclass
from enum import IntEnum

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import ReplicaRecord
from gearfall.scheduling.fleet.victims import Victim, VictimKind, first_to_go
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.queue_ahead import ends_in_s, queue_ahead, up_in_s
from gearfall.scheduling.placement.transfers import Transfer, find_transfer
from gearfall.scheduling.placement.work_ahead import idle_in_s
from gearfall.scheduling.scene import Scene, claimed_bytes, needed_bytes, predict

EVICTION_S = 0.1
"""Until an idle replica that was given back has left."""
DRAIN_S = 30.0
"""Until a busy one has, at most: its worker moves its jobs or lets them end."""
RETURN_WEIGHT = 0.25
"""Of the start that a victim may need again soon, against seconds of those who wait now."""
MOVE_COST_S = 0.25
"""What a move costs the jobs that move, in the same seconds."""
_NEVER_S = float("inf")
_MOVABLE = frozenset({VictimKind.BUSY, VictimKind.KEPT})


class Way(IntEnum):
    """How a place is had, least trouble first."""

    FREE = 0
    AWAIT = 1
    """Somebody is leaving already, or will have ended soonest."""
    EVICT = 2
    MOVE = 3


@dataclass(frozen=True, slots=True)
class Room:
    """What it takes on one worker."""

    way: Way
    wait_s: float = 0.0
    cost_s: float = 0.0
    victims: tuple[Victim, ...] = ()
    """To be given back now."""
    transfers: tuple[Transfer, ...] = ()
    ending: tuple[ModelName, ...] = ()
    """Whose jobs end by themselves soonest."""


@dataclass(slots=True)
class _Gap:
    """What is still missing on a worker."""

    size_bytes: float
    replicas: float

    def is_closed(self) -> bool:
        return self.size_bytes <= 0 and self.replicas <= 0

    def shrink(self, size_bytes: float, replicas: int = 1) -> None:
        self.size_bytes -= size_bytes
        self.replicas -= replicas


def room_on(scene: Scene, want: Want, worker_id: WorkerId, sooner_than_s: float) -> Room | None:
    """Return what it takes to have room; None when that can't be had, or not in that time."""
    fleet = scene.fleet
    row = fleet.rows.get(worker_id)
    own = claimed_bytes(fleet, want.model.name, worker_id)
    gap = _Gap(needed_bytes(fleet, want, worker_id) - row.free_bytes, 1 - row.free_replicas)
    if own is not None:
        gap.shrink(own)
    if gap.is_closed():
        return Room(Way.FREE)
    if want.urgency < Urgency.GEAR:
        return None
    leaving_s = _let_leave(scene, worker_id, gap)
    if gap.is_closed():
        return Room(Way.AWAIT, wait_s=leaving_s)
    victims = fleet.victims.get(worker_id, ())
    ready_to_go = [v for v in victims if v.is_cheap and v.rested_unix_s <= scene.now_unix_s]
    cheap = _choose(ready_to_go, gap)
    cost_s = sum(_return_cost_s(scene, victim) for victim in cheap)
    if gap.is_closed():
        return Room(Way.EVICT, max(leaving_s, EVICTION_S), cost_s, tuple(cheap))
    if want.urgency < Urgency.INTERACTIVE:
        return None
    busy = [v for v in victims if v not in ready_to_go]
    so_far = Room(Way.EVICT, leaving_s, cost_s, tuple(cheap))
    return _with_busy(scene, want, so_far, busy, gap=gap, sooner_than_s=sooner_than_s)


def _let_leave(scene: Scene, worker_id: WorkerId, gap: _Gap) -> float:
    """Count what is leaving as gone; return the seconds until it is."""
    records = scene.fleet.records
    leaving_s = 0.0
    for model in scene.fleet.index.held.get(worker_id, ()):
        key = (worker_id, model)
        if key not in records.assignments:
            gap.shrink(records.reserved_bytes(key))
            leaving_s = max(leaving_s, drained_in_s(scene, records.replicas.get(key)))
    return leaving_s


def drained_in_s(scene: Scene, replica: ReplicaRecord | None) -> float:
    """Return when a replica that is leaving has left."""
    if replica is None or not replica.running_jobs:
        return EVICTION_S
    if not replica.jobs:
        return DRAIN_S
    return min(DRAIN_S, max(EVICTION_S, idle_in_s(replica, scene.now_unix_s)))


def _choose(victims: list[Victim], gap: _Gap) -> list[Victim]:
    """Take victims in their order until the gap is closed; then those that it closes without."""
    chosen: list[Victim] = []
    for victim in first_to_go(victims):
        if gap.is_closed():
            break
        gap.shrink(victim.memory_bytes)
        chosen.append(victim)
    if not gap.is_closed():
        return chosen
    for victim in tuple(chosen[:-1]):
        if gap.size_bytes + victim.memory_bytes <= 0 and gap.replicas + 1 <= 0:
            gap.shrink(-victim.memory_bytes, -1)
            chosen.remove(victim)
    return chosen


def _return_cost_s(scene: Scene, victim: Victim) -> float:
    """Return what it costs that a victim may be asked for again soon and has to come back."""
    if victim.kind is VictimKind.HARVEST:
        return 0.0
    model = scene.fleet.model(victim.key[1])
    worker = scene.fleet.records.workers[victim.key[0]]
    start = predict(scene, model, worker.node_id) if model else None
    keep_alive_s = scene.fleet.limits_of(victim.key[1]).keep_alive_s
    if start is None or keep_alive_s <= 0:
        return 0.0
    idle_s = scene.now_unix_s - victim.idle_since_unix_s
    return RETURN_WEIGHT * start.total_s * max(0.0, 1.0 - idle_s / keep_alive_s)


def _with_busy(
    scene: Scene,
    want: Want,
    room: Room,
    busy: list[Victim],
    *,
    gap: _Gap,
    sooner_than_s: float,
) -> Room | None:
    """Have others move, end, come up and end, or go as well, whichever is soonest for each."""
    wait_s, cost_s = room.wait_s, room.cost_s
    victims, transfers, ending = list(room.victims), list[Transfer](), list[ModelName]()
    avoid = {victim.key[0] for victim in busy}
    for victim in first_to_go(busy):
        if gap.is_closed():
            break
        found = _soonest(scene, want, victim, frozenset(avoid), sooner_than_s)
        if found is None:
            continue
        gap.shrink(victim.memory_bytes)
        seconds, how = found
        wait_s = max(wait_s, seconds)
        if isinstance(how, Transfer):
            transfers.append(how)
            avoid.add(how.target)
            cost_s += MOVE_COST_S + how.cost_s
        elif how is Way.AWAIT:
            ending.append(victim.key[1])
        else:
            victims.append(victim)
    if not gap.is_closed():
        return None
    if ending:
        # Nothing goes before the last has ended: it may be that something else is better by then.
        return Room(Way.AWAIT, wait_s, 0.0, ending=tuple(ending))
    way = Way.MOVE if transfers else Way.EVICT
    return Room(way, wait_s, cost_s, tuple(victims), tuple(transfers))


def _soonest(
    scene: Scene, want: Want, victim: Victim, avoid: frozenset[WorkerId], sooner_than_s: float
) -> tuple[float, Transfer | Way] | None:
    """Return when the room of a victim can be had that does not just go, and how.

    One that has to stay yet, or is still starting, is only waited for.
    """
    found: list[tuple[float, int, Transfer | Way]] = []
    ends_in_s = _ends_in_s(scene, victim)
    goes_at = victim.goes_at(want.since_unix_s, scene.policy)
    has_to_stay = victim.rested_unix_s > scene.now_unix_s
    if goes_at <= scene.now_unix_s:
        found.append((min(DRAIN_S, max(EVICTION_S, ends_in_s)), 2, Way.EVICT))
    elif ends_in_s < _NEVER_S and (victim.is_cheap or scene.now_unix_s + ends_in_s < goes_at):
        found.append((ends_in_s, 0, Way.AWAIT))
    is_movable = want.moves_others and not has_to_stay and victim.kind in _MOVABLE
    if is_movable and ends_in_s > MOVE_COST_S:
        # A move that takes longer than waiting for the end is never the soonest.
        within_s = min(sooner_than_s, ends_in_s - MOVE_COST_S)
        transfer = find_transfer(scene, victim, avoid, within_s)
        if transfer is not None:
            found.append((transfer.seconds + MOVE_COST_S + transfer.cost_s, 1, transfer))
    if not found:
        return None
    seconds, _, how = min(found, key=lambda each: each[:2])
    return (how.seconds if isinstance(how, Transfer) else seconds), how


def _ends_in_s(scene: Scene, victim: Victim) -> float:
    """Return when a victim has left, once nothing is left to do for it and it may go.

    Infinite where nobody says, and for one that is kept. What waits for its own model counts: its
    replicas serve that first.
    """
    if victim.kind is VictimKind.KEPT:
        return _NEVER_S
    fleet, model = scene.fleet, victim.key[1]
    hosted = fleet.index.hosted.get(model, {})
    if waiting := fleet.index.waiting.get(model):
        ahead = queue_ahead(hosted.values(), waiting, scene.now_unix_s)
        ended_s = ahead.idle_in_s[victim.key]
    else:
        ended_s = ends_in_s(hosted[victim.key], scene.now_unix_s)
    if victim.kind is VictimKind.COMING:
        stays_s = up_in_s(hosted[victim.key], scene.now_unix_s) + scene.policy.min_residency_s
    else:
        stays_s = victim.rested_unix_s - scene.now_unix_s
    return max(ended_s, stays_s) + EVICTION_S
