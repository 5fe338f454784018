"""Where to start a replica: filter the workers, score by predicted start, pick; or make room."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.memory import estimate_replica_memory
from gearfall.core.origin import source_tier
from gearfall.core.records import ModelRecord, NodeRecord, Tier
from gearfall.scheduling.estimator import StartPrediction, predict_start
from gearfall.scheduling.snapshot import ReplicaKey, WorkerRoom
from gearfall.scheduling.start_costs import StartCosts

Rejected = tuple[tuple[str, str], ...]
"""(alternative, why not), best first."""
Loading = Mapping[NodeId, Mapping[ModelName, ModelRecord]]
"""What each node's store has been asked for and is not known to have yet."""

KEPT_REJECTED = 16


@dataclass(frozen=True, slots=True)
class Victim:
    """A replica that may have to make room."""

    key: ReplicaKey
    memory_bytes: int
    evictable_unix_s: float
    idle_since_unix_s: float
    """0 while it runs jobs: such a one goes last."""


@dataclass(frozen=True, slots=True)
class Place:
    """Start here."""

    worker_id: WorkerId
    memory_bytes: int
    prediction: StartPrediction
    reason: str
    rejected: Rejected


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """Give these back first; start when they are gone."""

    worker_id: WorkerId
    victims: tuple[Victim, ...]
    reason: str
    rejected: Rejected


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing can be done before something changes or `next_due_unix_s` comes."""

    reason: str
    rejected: Rejected
    next_due_unix_s: float | None = None


Placement = Place | MakeRoom | Wait


@dataclass(frozen=True, slots=True)
class Nodes:
    """The live nodes and what they are busy with."""

    by_id: Mapping[NodeId, NodeRecord]
    loading: Loading = field(default_factory=dict)

    def predict(
        self, model: ModelRecord, node: NodeRecord, costs: StartCosts
    ) -> StartPrediction | None:
        """Return the expected start on `node`; None when the model's bytes can't get there."""
        tier = source_tier(model, node, self.by_id)
        if tier is None:
            return None
        # Far and near loads run beside each other; among its kind each waits for those before it.
        before = self.loading.get(node.node_id, {}).values()
        queued_bytes = sum(
            other.size_bytes
            for other in before
            if other.name != model.name and source_tier(other, node, self.by_id) is tier
        )
        return predict_start(model, node, tier, costs, queued_bytes=queued_bytes)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could host the model if it had room."""

    room: WorkerRoom
    memory_bytes: int
    prediction: StartPrediction

    @property
    def rank(self) -> tuple[float, int, WorkerId]:
        """Soonest start first, then most free memory, then by name."""
        free_bytes = self.room.worker.memory_bytes - self.room.used_bytes
        return (self.prediction.total_s, -free_bytes, self.room.worker.worker_id)


def place(
    model: ModelRecord,
    rooms: Mapping[WorkerId, WorkerRoom],
    nodes: Nodes,
    victims: Iterable[Victim],
    *,
    costs: StartCosts,
    now_unix_s: float,
) -> Placement:
    """Decide where one more replica of `model` goes, with reasons and rejected alternatives."""
    victims = tuple(victims)
    candidates, rejected = _filter(model, rooms, nodes, costs)
    fitting = [c for c in candidates if c.room.fits(c.memory_bytes)]
    full = [c for c in candidates if not c.room.fits(c.memory_bytes)]
    if fitting:
        nearer = _make_room_nearer(fitting[0], full, victims, tuple(rejected), now_unix_s)
        if nearer is not None:
            return nearer
        best, *others = fitting
        slower = [(_name(c), f"starts in {c.prediction.terms()}") for c in others]
        no_room = [(_name(c), _why_full(c)) for c in full]
        return Place(
            best.room.worker.worker_id,
            best.memory_bytes,
            best.prediction,
            _why_best(best),
            tuple((*slower, *no_room, *rejected)[:KEPT_REJECTED]),
        )
    no_room = [(_name(c), _why_full(c)) for c in full]
    return _make_room(full, victims, (*no_room, *rejected)[:KEPT_REJECTED], now_unix_s)


def _filter(
    model: ModelRecord,
    rooms: Mapping[WorkerId, WorkerRoom],
    nodes: Nodes,
    costs: StartCosts,
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    candidates, rejected = [], []
    for room in rooms.values():
        found = _assess(model, room, nodes, costs)
        if isinstance(found, Candidate):
            candidates.append(found)
        else:
            rejected.append((f"worker {room.worker.worker_id}", found))
    return sorted(candidates, key=lambda c: c.rank), sorted(rejected)


def _assess(
    model: ModelRecord, room: WorkerRoom, nodes: Nodes, costs: StartCosts
) -> Candidate | str:
    """Return a worker as a candidate, or why it can never host the model as things are."""
    memory_bytes = estimate_replica_memory(model, room.worker.slots).total_bytes
    if obstacle := _worker_obstacle(model, room, memory_bytes):
        return obstacle
    node_id = room.worker.node_id
    node = nodes.by_id.get(node_id)
    if node is None:
        return f"the store of node {node_id} is not there"
    if model.size_bytes > node.dram_capacity_bytes:
        pool = node.dram_capacity_bytes
        return f"the pool of node {node_id} takes {pool} bytes, the model has {model.size_bytes}"
    prediction = nodes.predict(model, node, costs)
    if prediction is None:
        return _why_nowhere(model, node)
    return Candidate(room, memory_bytes, prediction)


def _why_nowhere(model: ModelRecord, node: NodeRecord) -> str:
    if model.name in (*node.resident, *(node.on_ssd or ())):
        return f"node {node.node_id} has other bytes under that name"
    return f"node {node.node_id} does not hold the checkpoint, and no live node or URL gives it"


def _worker_obstacle(model: ModelRecord, room: WorkerRoom, memory_bytes: int) -> str:
    worker = room.worker
    if not room.is_reachable:
        return "its connection is broken"
    if worker.max_replicas < 1:
        return "it takes no replicas"
    if model.name in room.hosting:
        return _why_hosting(model.name, room)
    if memory_bytes > worker.memory_bytes:
        return f"needs {memory_bytes} bytes, it has {worker.memory_bytes} in all"
    return ""


def _why_hosting(model: ModelName, room: WorkerRoom) -> str:
    if model in room.failing:
        return f"its replica does not start: {room.failing[model]}"
    leaving = model in room.leaving
    return "its replica is still leaving" if leaving else "it hosts the model already"


def _make_room_nearer(
    best: Candidate,
    full: list[Candidate],
    victims: tuple[Victim, ...],
    rejected: Rejected,
    now_unix_s: float,
) -> MakeRoom | Wait | None:
    """Have idle replicas leave where the model is, when it would else be fetched for longer."""
    if best.prediction.from_tier is not Tier.REMOTE:
        return None
    nearer = [c for c in full if c.prediction.total_s < best.prediction.total_s]
    idle = tuple(v for v in victims if v.idle_since_unix_s > 0.0)
    no_room = [(_name(c), _why_full(c)) for c in full]
    fetching = (_name(best), f"starts in {best.prediction.terms()}")
    alternatives = (fetching, *no_room, *rejected)[:KEPT_REJECTED]
    found = _make_room(nearer, idle, alternatives, now_unix_s)
    is_leaving = any(c.room.fits(c.memory_bytes, after_leaving=True) for c in nearer)
    return found if is_leaving or isinstance(found, MakeRoom) else None


def _make_room(
    full: list[Candidate], victims: tuple[Victim, ...], rejected: Rejected, now_unix_s: float
) -> MakeRoom | Wait:
    for candidate in full:
        if candidate.room.fits(candidate.memory_bytes, after_leaving=True):
            return Wait(f"room is being made on {_name(candidate)}", rejected)
    due: list[float] = []
    for candidate in full:
        of_worker = [v for v in victims if v.key[0] == candidate.room.worker.worker_id]
        chosen = _choose_victims(candidate, [v for v in of_worker if _is_due(v, now_unix_s)])
        if chosen is not None:
            names = ", ".join(v.key[1] for v in chosen)
            return MakeRoom(
                candidate.room.worker.worker_id,
                chosen,
                f"gives back {names} on {_name(candidate)} first",
                rejected,
            )
        due += [v.evictable_unix_s for v in of_worker if not _is_due(v, now_unix_s)]
    if not full:
        return Wait("no worker can host it", rejected)
    return Wait("no worker has room and nothing may leave yet", rejected, min(due, default=None))


def _is_due(victim: Victim, now_unix_s: float) -> bool:
    return victim.evictable_unix_s <= now_unix_s


def _choose_victims(candidate: Candidate, victims: list[Victim]) -> tuple[Victim, ...] | None:
    """Least recently used first, busy ones last; None when even all of them do not make room."""
    room, chosen = candidate.room, []
    for victim in sorted(
        victims, key=lambda v: (v.idle_since_unix_s == 0.0, v.idle_since_unix_s, v.key)
    ):
        room = room.with_leaving(victim.key[1], victim.memory_bytes)
        chosen.append(victim)
        if room.fits(candidate.memory_bytes, after_leaving=True):
            return tuple(chosen)
    return None


def _name(candidate: Candidate) -> str:
    return f"worker {candidate.room.worker.worker_id}"


def _why_full(candidate: Candidate) -> str:
    room = candidate.room
    if len(room.hosting) >= room.worker.max_replicas:
        return f"hosts {len(room.hosting)} of at most {room.worker.max_replicas} replicas"
    free_bytes = room.worker.memory_bytes - room.used_bytes
    return f"needs {candidate.memory_bytes} bytes, {free_bytes} are free"


def _why_best(candidate: Candidate) -> str:
    return f"{_name(candidate)} starts soonest, in {candidate.prediction.terms()}"
