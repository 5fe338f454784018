"""Which workers are worth a closer look: one pass over the columns of all of them.

The seconds here are only for choosing whom to look at: bytes over bandwidth behind what is queued,
by each node's published figures. `scene.predict` says what a start really is expected to take.
"""

from collections.abc import Iterable

import numpy as np

from gearfall.core.ids import NodeId, WorkerId, is_url
from gearfall.core.tiers import Tier
from gearfall.scheduling.fleet.fleet_state import FleetState
from gearfall.scheduling.fleet.wants import Want
from gearfall.scheduling.fleet.worker_rows import Floats, Mask, Rows
from gearfall.scheduling.scene import is_crowded

EXAMINED = 5
"""Workers with room that are looked at closely."""
_PER_USED_BYTE = 1e-15
"""Seconds; the emptier of equals comes first."""
_CROWDED_S = 1e6
OFF_PLAN_S = 1.0
"""What has to be gained to start somewhere else than where a gear plan wants the model."""
_EVICT_S = 0.1
_MOVE_S = 0.5
"""Guesses of what it takes to have room made, for choosing only."""


class Search:
    """One model's view of all workers. Valid until a row changes."""

    def __init__(self, fleet: FleetState, want: Want) -> None:
        self._fleet = fleet
        self._want = want
        self._rows = fleet.rows
        self._seconds = _load_seconds(fleet, want)
        self._can_host = self._seconds < np.inf
        self._need = _needs(fleet, want)
        self._score = self._seconds + _PER_USED_BYTE * fleet.rows.column("used_bytes")
        if want.wished:
            self._score += OFF_PLAN_S
            self._score[_on_nodes(fleet, want.wished)] -= OFF_PLAN_S
        if want.rules.spread:
            self._score[_on_crowded_nodes(fleet, want)] += _CROWDED_S

    @property
    def finds_any(self) -> bool:
        """Whether any worker could host it if it had room."""
        return bool(self._can_host.any())

    def has_room(self, kind: str) -> Mask:
        """Return where it fits now (`free`), once idle ones went (`idle`), or busy ones too."""
        rows = self._rows
        found = self._can_host & (rows.column(f"{kind}_replicas") >= 1)
        found &= rows.column(f"{kind}_bytes") >= self._need
        claims, model = self._fleet.claims, self._want.model.name
        for worker_id in claims.workers_of(model):
            number, size_bytes = rows.number_of(worker_id), claims.on(worker_id)[model]
            if number is not None:
                has_bytes = rows.column(f"{kind}_bytes")[number] + size_bytes >= self._need_at(
                    number
                )
                has_place = rows.column(f"{kind}_replicas")[number] >= 0
                found[number] = bool(self._can_host[number] and has_bytes and has_place)
        return found

    def free(self, most: int = EXAMINED) -> list[WorkerId]:
        """Return workers where it fits now, soonest start first."""
        return self._best(self.has_room("free"), self._score, most)

    def full(self, below_s: float, *, also_busy: bool, most: int) -> list[WorkerId]:
        """Return workers where it would fit later and starts sooner than in `below_s` seconds."""
        idle = self.has_room("idle")
        room = self.has_room("busy") if also_busy else idle
        room = room & ~self.has_room("free")
        if below_s < np.inf:
            room &= self._score < below_s
        if not room.any():
            return []
        return self._best(room, self._score + np.where(idle, _EVICT_S, _MOVE_S), most)

    def nodes_with(self, kind: str, workers: int, most: int) -> list[tuple[WorkerId, ...]]:
        """Return the workers with such room by node, of nodes that have at least `workers`."""
        numbers = np.flatnonzero(self.has_room(kind))
        if len(numbers) < workers:
            return []
        nodes = self._rows.column("node")[numbers].astype(np.intp)
        enough = np.flatnonzero(np.bincount(nodes) >= workers)
        best_s = np.full(int(nodes.max()) + 1, np.inf)
        np.minimum.at(best_s, nodes, self._score[numbers])
        chosen = enough[np.argsort(best_s[enough], kind="stable")[:most]]
        return [
            tuple(sorted(self._rows.worker_at(int(each)) for each in numbers[nodes == node]))
            for node in chosen
        ]

    def left_out(
        self, most: int, besides: Iterable[WorkerId]
    ) -> tuple[list[WorkerId], list[WorkerId]]:
        """Return some workers that could host it but are full, and some that can't host it."""
        known = set(besides)
        is_live = self._rows.column("slots") > 0
        full = np.flatnonzero(self._can_host)[: most + len(known)]
        never = np.flatnonzero(is_live & ~self._can_host)[: most + len(known)]
        return (
            [w for w in map(self._worker_at, full) if w not in known][:most],
            [w for w in map(self._worker_at, never) if w not in known][:most],
        )

    def _worker_at(self, number: np.intp) -> WorkerId:
        return self._rows.worker_at(int(number))

    def _need_at(self, number: int) -> float:
        return self._need if isinstance(self._need, float) else float(self._need[number])

    def _best(self, mask: Mask, score: Floats, most: int) -> list[WorkerId]:
        numbers = np.flatnonzero(mask)
        if len(numbers) > most:
            numbers = numbers[np.argpartition(score[numbers], most - 1)[:most]]
        numbers = numbers[np.argsort(score[numbers], kind="stable")]
        return [self._worker_at(each) for each in numbers]


def may_be_free(fleet: FleetState, want: Want) -> bool:
    """Whether any worker has room for a replica now, or keeps some: a look before the search."""
    rows = fleet.rows
    has_room = rows.column("free_replicas") >= 1
    has_room &= rows.column("free_bytes") >= _needs(fleet, want)
    return bool(has_room.any()) or bool(fleet.claims.workers_of(want.model.name))


def _load_seconds(fleet: FleetState, want: Want) -> Floats:
    """Return the seconds to have the bytes on each worker's node; infinite where it can't be."""
    rows, model, nodes = fleet.rows, want.model, fleet.records.nodes
    if is_url(model.source) or any(each in nodes for each in model.nodes):
        seconds = rows.column("remote_s_per_byte") * float(model.size_bytes)
        seconds += rows.column("remote_queued_s")
    else:
        seconds = np.full(len(rows), np.inf)
    _set_out_of_line(fleet, want, seconds)
    seconds[rows.column("pool_bytes") < max(1, model.size_bytes)] = np.inf
    if want.node_id is not None:
        elsewhere = np.ones(len(rows), dtype=np.bool_)
        elsewhere[_on_nodes(fleet, (want.node_id,))] = False
        seconds[elsewhere] = np.inf
    if want.rules.labels:
        seconds[~_matching(fleet, want)] = np.inf
    seconds[_numbers(fleet, fleet.index.holders.get(model.name, ()))] = np.inf
    return seconds


def _set_out_of_line(fleet: FleetState, want: Want, seconds: Floats) -> None:
    rows, model = fleet.rows, want.model
    by_tier: dict[Tier | None, list[WorkerId]] = {}
    for node_id in fleet.index.nodes_out_of_line(model, fleet.records.nodes):
        if node_id in fleet.records.nodes:
            tier = fleet.source_tier(model, node_id)
            by_tier.setdefault(tier, []).extend(fleet.index.workers.get(node_id, ()))
    for tier, workers in by_tier.items():
        numbers = _numbers(fleet, workers)
        if tier is None:
            seconds[numbers] = np.inf
        elif tier is Tier.DRAM:
            seconds[numbers] = 0.0
        else:
            per_byte = rows.column(f"{tier.value}_s_per_byte")[numbers]
            queued = rows.column(f"{tier.value}_queued_s")[numbers]
            seconds[numbers] = per_byte * float(model.size_bytes) + queued


def _on_nodes(fleet: FleetState, nodes: Iterable[NodeId]) -> Rows:
    return _numbers(fleet, [w for each in nodes for w in fleet.index.workers.get(each, ())])


def _numbers(fleet: FleetState, workers: Iterable[WorkerId]) -> Rows:
    numbers = (fleet.rows.number_of(each) for each in workers)
    return np.array([each for each in numbers if each is not None], dtype=np.intp)


def _matching(fleet: FleetState, want: Want) -> Mask:
    labels, rows = want.rules.labels, len(fleet.rows)
    mask = fleet.label_masks.get(labels, rows)
    if mask is None:
        mask = fleet.label_masks.add(labels, rows)
        for worker_id, worker in fleet.records.workers.items():
            number = fleet.rows.number_of(worker_id)
            if number is not None:
                mask[number] = want.rules.allow(worker)
    return mask


def _needs(fleet: FleetState, want: Want) -> Floats | float:
    kinds = fleet.rows.kinds_of_slots()
    accelerators = want.rules.accelerators
    needs = [float(fleet.needed_bytes(want.model, slots, accelerators)) for slots in kinds]
    if len(kinds) <= 1:
        return needs[0] if needs else 0.0
    column = fleet.rows.column("slots")
    found = np.full(len(column), np.inf)
    for slots, need in zip(kinds, needs, strict=True):
        found[column == slots] = need
    return found


def _on_crowded_nodes(fleet: FleetState, want: Want) -> Rows:
    name = want.model.name
    nodes: set[NodeId] = {
        fleet.records.workers[each].node_id
        for each in fleet.index.holders.get(name, ())
        if each in fleet.records.workers
    }
    workers = [w for n in nodes if is_crowded(fleet, name, n) for w in fleet.index.workers[n]]
    return _numbers(fleet, workers)
