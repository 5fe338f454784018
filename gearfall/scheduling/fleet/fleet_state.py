"""What the fleet's owner keeps, and what can be read from it."""

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from gearfall.core.gears.gears_in_force import PlanShelf
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import ModelRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.due_times import DueTimes
from gearfall.scheduling.fleet.claims import Claims
from gearfall.scheduling.fleet.fleet_index import FleetIndex
from gearfall.scheduling.fleet.fleet_records import FleetRecords
from gearfall.scheduling.fleet.label_masks import LabelMasks
from gearfall.scheduling.fleet.lines import Lines
from gearfall.scheduling.fleet.victims import Victim
from gearfall.scheduling.fleet.wants import PlacementRules, Want, replica_bytes, rules_of
from gearfall.scheduling.fleet.worker_rows import WorkerRows
from gearfall.scheduling.scaling.autoscaler import ModelLimits, SchedulerPolicy, limits_by_model
from gearfall.scheduling.scaling.autoscaler_load import ModelLoad
from gearfall.scheduling.scaling.gear_wishes import GearWish, kept_replicas
from gearfall.scheduling.snapshot import Hosted, ReplicaKey, on_bases


class ModelFlags(NamedTuple):
    """What one model means for the rows of all workers that host it."""

    waits: bool = False
    waits_interactively: bool = False
    is_spare: bool = False
    """Whether it would keep its min_replicas with one replica less."""
    kept: frozenset[ReplicaKey] = frozenset()
    """Replicas that gear plans want where they are."""


class FleetState:
    """Records, index, and what was touched since the rows were last brought up to date."""

    def __init__(self) -> None:
        self.records = FleetRecords()
        self.index = FleetIndex()
        self.rows = WorkerRows()
        self.claims = Claims()
        self.label_masks = LabelMasks()
        self.victims: dict[WorkerId, tuple[Victim, ...]] = {}
        """Of each worker with any, whether they may go already or not."""
        self.model_due: DueTimes[ModelName] = DueTimes()
        self.worker_due: DueTimes[WorkerId] = DueTimes()
        self.dirty_models: set[ModelName] = set()
        self.dirty_workers: set[WorkerId] = set()
        self.node_touches: dict[NodeId, int] = {}
        """How often what its workers have in common may have changed: loads come and go."""
        self.grown: set[WorkerId] = set()
        """Workers that offer more than when those who wait for room were last looked at."""
        self.blocked: dict[ModelName, Want] = {}
        """What found no room, in the order in which it was first looked for."""
        self.promises: dict[ModelName, float] = {}
        """When what waits for a model was last said to have begun on its own replicas."""
        self.lines = Lines()
        """Of those that were told to wait until somebody ends on a worker."""
        self.loads: dict[ModelName, ModelLoad] = {}
        self.gears: dict[ModelName, GearWish] = {}
        """What gear plans want of each model that they place."""
        self.plan_shelf = PlanShelf()
        self.gears_changed = False
        """Whether a plan, a gear or a plan's nodes are others than `gears` was made from."""
        self.gears_due_unix_s = 0.0
        self.prefetch_due_unix_s = 0.0
        self.prefetch_turns: deque[ModelName] = deque()
        """Models that have not been looked at since all had their turn."""
        self.policy = SchedulerPolicy()
        self.flags: dict[ModelName, ModelFlags] = {}
        """What other workers' rows depend on, as of the last time they were brought up to date."""
        self._needs: dict[ModelName, dict[tuple[int, int], int]] = {}
        self._limits: dict[ModelName, tuple[ModelLimits, PlacementRules]] = {}

    def touch_worker(self, worker_id: WorkerId) -> None:
        """Have a worker's row made anew."""
        self.dirty_workers.add(worker_id)

    def touch_node(self, node_id: NodeId) -> None:
        """Have the rows of all workers of a node made anew."""
        workers = self.index.workers.get(node_id, set())
        self.dirty_workers |= workers
        if workers or node_id in self.records.nodes:
            self.node_touches[node_id] = self.node_touches.get(node_id, 0) + 1
        else:
            self.node_touches.pop(node_id, None)

    def needed_bytes(self, model: ModelRecord, slots: int, accelerators: int) -> int:
        """Return what a replica reserves on a worker of so many slots; see `replica_bytes`."""
        known = self._needs.setdefault(model.name, {})
        size_bytes = known.get((slots, accelerators))
        if size_bytes is None:
            size_bytes = known[slots, accelerators] = replica_bytes(model, slots, accelerators)
        return size_bytes

    def forget_needs(self, model: ModelName) -> None:
        """Have what a model needs worked out anew from its record."""
        self._needs.pop(model, None)

    def forget_limits(self, model: ModelName) -> None:
        """Have a model's limits and rules read anew from its deployments."""
        self._limits.pop(model, None)

    def model(self, name: ModelName) -> ModelRecord | None:
        """Return a model that may have replicas; None for adapters and those being removed."""
        record = self.records.models.get(name)
        return None if record is None or record.is_removing or record.base else record

    def host_of(self, name: ModelName) -> ModelName:
        """Return the model that a name's replicas are of: of an adapter its base."""
        record = self.records.models.get(name)
        return ModelName(record.base) if record is not None and record.base else name

    def limits_of(self, model: ModelName) -> ModelLimits:
        """Return how many replicas a model may have."""
        return self._limits_and_rules(model)[0]

    def rules_of(self, model: ModelName) -> PlacementRules:
        """Return where a model's replicas may go."""
        return self._limits_and_rules(model)[1]

    def counted(self, model: ModelName) -> tuple[Hosted, ...]:
        """Return what a model really has: in reach, not failing, a group once, a move once."""
        records = self.records
        hosted = self.index.hosted.get(model, {})
        return tuple(
            hosted[key]
            for key in sorted(hosted)
            if key[0] in records.workers
            and key[0] not in records.unreachable
            and not hosted[key].is_failing
            and not _is_follower(hosted[key])
            and not (key in self.index.arriving and self._is_arriving(hosted[key]))
        )

    def by_node(self, model: ModelName) -> dict[NodeId, list[Hosted]]:
        """Return what a model really has, by node."""
        found: dict[NodeId, list[Hosted]] = {}
        for hosted in self.counted(model):
            node_id = self.records.workers[hosted.key[0]].node_id
            found.setdefault(node_id, []).append(hosted)
        return found

    def kept(self, model: ModelName) -> frozenset[ReplicaKey]:
        """Return the replicas of a model that gear plans want where they are."""
        wish = self.gears.get(model)
        return kept_replicas(wish, self.by_node(model)) if wish and wish.by_node else frozenset()

    def source_tier(self, model: ModelRecord, node_id: NodeId) -> Tier | None:
        """Return where the bytes of a start on a live node would come from."""
        return self.index.source_tier(model, node_id, self.records.nodes)

    def loading_on(self, node_id: NodeId) -> dict[ModelName, float]:
        """Return what a node's store was asked for and is not known to have, and since when."""
        found: dict[ModelName, float] = {}
        for worker_id in self.index.workers.get(node_id, ()):
            for model in self.index.held.get(worker_id, ()):
                if (worker_id, model) in self.index.loading:
                    since_unix_s = self.records.assignments[worker_id, model].assigned_unix_s
                    found[model] = min(since_unix_s, found.get(model, since_unix_s))
        return found

    def _limits_and_rules(self, model: ModelName) -> tuple[ModelLimits, PlacementRules]:
        found = self._limits.get(model)
        if found is None:
            named = {model, *self.index.adapters.get(model, ())}
            names = {d for each in named for d in self.index.deployments.get(each, ())}
            mine = {name: self.records.deployments[name] for name in sorted(names)}
            adapters = {each: self.records.models[each] for each in named - {model}}
            as_bases = on_bases(mine, adapters) if adapters else mine
            limits = limits_by_model((model,), as_bases, self.policy)[model]
            if (wish := self.gears.get(model)) is not None:
                known_s = limits.keep_alive_s if mine else 0.0
                limits = replace(
                    limits,
                    max_replicas=max(limits.max_replicas, wish.most),
                    keep_alive_s=max(known_s, wish.keep_alive_s),
                )
            found = self._limits[model] = (limits, rules_of(mine.values()))
        return found

    def is_spare(self, model: ModelName) -> bool:
        """Whether a model would keep its min_replicas with one replica less."""
        if self.model(model) is None:
            return False
        return len(self.counted(model)) > self.limits_of(model).min_replicas

    def _is_arriving(self, hosted: Hosted) -> bool:
        """Whether it was started for a move whose other end is still assigned, and counts there."""
        assignments = self.records.assignments
        return any(
            move in assignments
            and hosted.assignment.assigned_unix_s >= self.records.moves[move].began_unix_s
            for move in self.index.arriving.get(hosted.key, ())
        )


def _is_follower(hosted: Hosted) -> bool:
    group = hosted.assignment.group
    return bool(group) and group[0] != hosted.assignment.worker_id
