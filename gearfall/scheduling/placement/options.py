"""Where one more replica could start and what each place would take: filter, score, sort.

All ways to a place are compared by the same figure, the predicted seconds to the first token of the
waiting work with what it costs others: start where there is room, after idle replicas went, after
running jobs moved (ServerlessLLM, arXiv 2401.14351, section 6), or after they ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.estimator import StartPrediction
from gearfall.scheduling.fleet.victims import Victim
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.groups import find_groups
from gearfall.scheduling.placement.placement_search import EXAMINED, OFF_PLAN_S, Search
from gearfall.scheduling.placement.room_making import Way, drained_in_s, room_on
from gearfall.scheduling.placement.transfers import Transfer
from gearfall.scheduling.scene import (
    Scene,
    claimed_bytes,
    is_coming,
    is_crowded,
    may_fetch_ahead,
    needed_bytes,
    predict,
    push_out_s,
)
from gearfall.scheduling.snapshot import ReplicaKey

CLAIMED_S = 0.5
"""What has to be gained to leave a place where room is being made already for another one."""
_FULL_EXAMINED = 3
_MOST_RIVALS = 40
_MOST_NEARER_NODES = 4
_NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class Option:
    """One place with what it takes; several workers for a model on several accelerators."""

    way: Way
    workers: tuple[WorkerId, ...]
    memory_bytes: Mapping[WorkerId, int]
    """To reserve on each."""
    prediction: StartPrediction
    wait_s: float
    """Until there is room."""
    cost_s: float
    """To others."""
    free_bytes: float
    """Left there before; the emptier of equals is taken."""
    places: int = 1
    """Replicas that have room there, at least this one."""
    is_crowded: bool = False
    """Whether another replica is on that node though they should be spread."""
    victims: tuple[Victim, ...] = ()
    """To be given back at once."""
    transfers: tuple[Transfer, ...] = ()
    ending: tuple[ModelName, ...] = ()
    """Models whose jobs will have ended soonest."""
    fetches_ahead: bool = False
    """Whether the bytes come while room is waited for."""
    is_coming: bool = False
    """Whether its node was told to bring them already; the one of equals is taken."""

    @property
    def seconds(self) -> float:
        """To a ready replica."""
        if self.fetches_ahead:
            return self.prediction.after_s(self.wait_s)
        return self.wait_s + self.prediction.total_s

    @property
    def score(self) -> float:
        """Seconds, with what it costs others."""
        return self.seconds + self.cost_s

    @property
    def rank(self) -> tuple[bool, float, int, bool, float, tuple[WorkerId, ...]]:
        """Best first."""
        return (
            self.is_crowded,
            self.score,
            self.way,
            not self.is_coming,
            -self.free_bytes,
            self.workers,
        )

    @property
    def touches(self) -> set[WorkerId]:
        """Workers whose room it depends on."""
        return {*self.workers, *(each.target for each in self.transfers)}


def find_options(
    scene: Scene, want: Want, search: Search, rivals: int = 0, below_s: float = _NEVER_S
) -> list[Option]:
    """Return the places worth considering, best first; empty when nothing can be had now.

    `rivals`: others that look for places at the same time, for whom there have to be enough.
    `below_s`: room that takes longer to make than this need not be found.
    """
    if want.rules.accelerators > 1:
        sites = find_groups(scene, want, search)
        found = [assess(scene, want, workers) for workers in sites]
        return sorted(filter(None, found), key=lambda option: option.rank)
    free = [
        assess(scene, want, (each,)) for each in search.free(EXAMINED + min(rivals, _MOST_RIVALS))
    ]
    options = [each for each in free if each is not None]
    if want.urgency >= Urgency.GEAR:
        best = min(options, key=lambda option: option.rank, default=None)
        options += _by_making_room(scene, want, search, best, below_s)
        options += _by_coming_back(scene, want)
    return sorted(options, key=lambda option: option.rank)


def with_nearer(scene: Scene, want: Want, options: list[Option]) -> list[Option]:
    """Return options, best first, with the places worth waiting for where the bytes are in memory.

    For those of which only some workers were looked at.
    """
    if not options or options[0].prediction.from_tier is Tier.DRAM or want.node_id is not None:
        return options
    index, best = scene.fleet.index, options[0]
    known = {each for option in options for each in option.workers}
    known |= index.holders.get(want.model.name, set())
    nodes = sorted(index.resident.get(want.model.name, ()))[:_MOST_NEARER_NODES]
    near = [w for node in nodes for w in sorted(index.workers.get(node, set()) - known)]
    still = replace(want, moves_others=False)
    found = [assess(scene, still, (worker_id,), best.score) for worker_id in near]
    nearer = [option for option in found if option is not None and option.rank < best.rank]
    return sorted((*options, *nearer), key=lambda option: option.rank)


def _by_making_room(
    scene: Scene, want: Want, search: Search, best: Option | None, below_s: float
) -> list[Option]:
    load_below_s = below_s
    if best is not None and not best.is_crowded:
        below_s = min(below_s, best.score)
        # The start beside moving bytes is about the same everywhere: room pays by what it saves.
        load_below_s = min(below_s, best.prediction.queued_s + best.prediction.load_s)
    options = []
    also_busy = want.urgency is Urgency.INTERACTIVE
    for worker_id in search.full(load_below_s, also_busy=also_busy, most=_FULL_EXAMINED):
        option = assess(scene, want, (worker_id,), below_s)
        if option is not None and (best is None or option.rank < best.rank):
            options.append(option)
            below_s = min(below_s, option.score) if not option.is_crowded else below_s
    return options


def _by_coming_back(scene: Scene, want: Want) -> list[Option]:
    """Return what it takes to start again where a replica is just leaving: its bytes are there."""
    records, model = scene.fleet.records, want.model.name
    options = []
    for worker_id in sorted(scene.fleet.index.holders.get(model, ())):
        key = (worker_id, model)
        if key in records.assignments or not may_host(scene, want, worker_id):
            continue
        options.append(assess(scene, want, (worker_id,)))
    return [each for each in options if each is not None]


def may_host(scene: Scene, want: Want, worker_id: WorkerId) -> bool:
    """Whether a worker takes replicas, and this one among them."""
    records = scene.fleet.records
    worker = records.workers.get(worker_id)
    return (
        worker is not None
        and worker.max_replicas > 0
        and worker_id not in records.unreachable
        and want.node_id in {None, worker.node_id}
        and want.rules.allow(worker)
    )


def assess(
    scene: Scene, want: Want, workers: tuple[WorkerId, ...], below_s: float = _NEVER_S
) -> Option | None:
    """Return what it takes to start at workers that may host it; None when that can't be had.

    No worker hosts a model twice: where a replica of it is leaving, that has to be gone first.
    `below_s`: options that take longer than this need not be found.
    """
    fleet = scene.fleet
    if any(each not in fleet.rows for each in workers):
        return None
    node_id = fleet.records.workers[workers[0]].node_id
    prediction = predict(scene, want.model, node_id)
    if prediction is None:
        return None
    own = [claimed_bytes(fleet, want.model.name, each) for each in workers]
    burden_s = push_out_s(scene, want.model, node_id, prediction) - CLAIMED_S * (None not in own)
    burden_s += OFF_PLAN_S * (bool(want.wished) and node_id not in want.wished)
    sooner_than_s = below_s - prediction.total_s - burden_s
    if sooner_than_s <= 0:
        return None
    if fetches_ahead := may_fetch_ahead(scene, want, workers[0]):
        sooner_than_s += prediction.loaded_s
    rooms = [room_on(scene, want, worker_id, sooner_than_s) for worker_id in workers]
    found = [room for room in rooms if room is not None]
    if len(found) < len(rooms):
        return None
    way = max(room.way for room in found)
    if any(room.ending for room in found):
        way = Way.AWAIT
    gone_in_s = [_gone_in_s(scene, (each, want.model.name)) for each in workers]
    if any(gone_in_s):
        way = max(way, Way.AWAIT)
    gives = way is not Way.AWAIT
    rows = [fleet.rows.get(each) for each in workers]
    return Option(
        way=way,
        workers=workers,
        memory_bytes={each: needed_bytes(fleet, want, each) for each in workers},
        prediction=prediction,
        wait_s=max(*gone_in_s, *(room.wait_s for room in found)),
        cost_s=sum(room.cost_s for room in found) + burden_s,
        free_bytes=min(row.free_bytes for row in rows),
        places=max(1, int(min(row.free_replicas for row in rows))),
        is_crowded=want.rules.spread and is_crowded(fleet, want.model.name, node_id),
        victims=tuple(victim for room in found for victim in room.victims if gives),
        transfers=tuple(each for room in found for each in room.transfers if gives),
        ending=tuple(name for room in found for name in room.ending),
        fetches_ahead=fetches_ahead,
        is_coming=is_coming(fleet, want.model.name, node_id),
    )


def _gone_in_s(scene: Scene, key: ReplicaKey) -> float:
    """Return when a replica that is leaving has left; 0 where none is."""
    records = scene.fleet.records
    if key in records.assignments or key not in records.replicas:
        return 0.0
    return drained_in_s(scene, records.replicas[key])
