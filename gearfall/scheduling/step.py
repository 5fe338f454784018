"""The working state of one decision step: what it does is noted, and counts at once."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import AssignmentRecord, DecisionRecord, MoveRecord, PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.scheduling.actions import (
    Action,
    Assign,
    BeginMove,
    Decide,
    EndMove,
    Unassign,
    Undecide,
    Unwish,
    Wish,
)
from gearfall.scheduling.fleet.claims import Claim, Site
from gearfall.scheduling.fleet.fleet import Fleet
from gearfall.scheduling.fleet.wants import Urgency, Want
from gearfall.scheduling.placement.placement_reasons import Rejected
from gearfall.scheduling.scene import Scene, claimed_bytes, is_coming, needed_bytes, predict
from gearfall.scheduling.snapshot import ReplicaKey

CLAIM_S = 60.0
"""Room that is being made is kept for the model that it is made for at most this long."""


@dataclass(slots=True)
class Step:
    """Owner of the actions; every one of them is assumed in the fleet until the step ends."""

    scene: Scene
    fleet: Fleet
    actions: list[Action] = field(default_factory=list)
    due_unix_s: dict[ModelName, float] = field(default_factory=dict)
    started_on: dict[ModelName, set[NodeId]] = field(default_factory=dict)
    """Nodes on which models got a place in this step."""

    @property
    def now_unix_s(self) -> float:
        """When the step is made."""
        return self.scene.now_unix_s

    def look_again(self, model: ModelName, at_unix_s: float) -> None:
        """Have a model looked at again at that time though nothing changes."""
        if at_unix_s > self.now_unix_s:
            self.due_unix_s[model] = min(at_unix_s, self.due_unix_s.get(model, at_unix_s))

    def assign(self, assignment: AssignmentRecord) -> None:
        """Assign a replica, or one worker's share of it."""
        self.fleet.assume("assignments", assignment)
        self.actions.append(Assign(assignment))

    def unassign(self, key: ReplicaKey, reason: str) -> None:
        """Take an assignment back, with the rest of its group, if it has not been yet."""
        assignment = self.fleet.records.assignments.get(key)
        if assignment is None:
            return
        for worker_id in assignment.group or (key[0],):
            member = (worker_id, key[1])
            if member in self.fleet.records.assignments:
                self.fleet.assume_gone("assignments", member)
                self.actions.append(Unassign(member, reason))

    def begin_move(self, move: MoveRecord) -> None:
        """Write a move down."""
        self.fleet.assume("moves", move)
        self.actions.append(BeginMove(move))

    def end_move(self, key: ReplicaKey, reason: str) -> None:
        """Delete a move."""
        self.fleet.assume_gone("moves", key)
        self.actions.append(EndMove(key, reason))

    def fetch_ahead(self, model: ModelName, node_id: NodeId, reason: str) -> None:
        """Have a node's store bring a model's bytes to memory, unless it was told to."""
        if not is_coming(self.fleet, model, node_id):
            wish = PrefetchRecord(node_id, model, Tier.DRAM, reason, self.now_unix_s)
            self.fleet.assume("prefetch", wish)
            self.actions.append(Wish(wish))

    def fetch_nowhere_else(self) -> None:
        """Take back that bytes are brought to other nodes than where their model starts.

        Those of a model that waits for one more replica still come to where it waits.
        """
        wishes = self.fleet.records.prefetch if self.started_on else ()
        for node_id, model in sorted(wishes):
            nodes = self.started_on.get(model, {node_id})
            if node_id not in nodes and model not in self.fleet.blocked:
                self.fleet.assume_gone("prefetch", (node_id, model))
                reason = f"starts on node {', '.join(sorted(nodes))}"
                self.actions.append(Unwish((node_id, model), reason))

    def start_move_target(self, move: MoveRecord) -> bool:
        """Start a moving model at its target; False when it has no room there."""
        model = self.fleet.model(move.model)
        worker = self.fleet.records.workers.get(move.target)
        self.refresh()
        if model is None or worker is None or worker.node_id not in self.fleet.records.nodes:
            return False
        want = Want(model, Urgency.KEEP, self.now_unix_s, rules=self.fleet.rules_of(move.model))
        need, row = needed_bytes(self.fleet, want, move.target), self.fleet.rows.get(move.target)
        start = predict(self.scene, model, worker.node_id)
        if start is None or row.free_replicas < 1 or row.free_bytes < need:
            return False
        reason = f"moves here from worker {move.worker_id}: {move.reason}"
        self.assign(
            AssignmentRecord(move.target, move.model, need, reason, self.now_unix_s, start.total_s)
        )
        self.decide(
            move.model, "start", reason, worker_id=move.target, predicted_start_s=start.total_s
        )
        return True

    def claim(self, want: Want, workers: Iterable[WorkerId], until_unix_s: float) -> None:
        """Keep room that is being made on workers for the model that it is made for."""
        size_bytes = {each: needed_bytes(self.fleet, want, each) for each in workers}
        self.fleet.dirty_workers |= self.fleet.claims.put(
            want.model.name, want.node_id, Claim(size_bytes, self.now_unix_s, until_unix_s)
        )

    def claim_for_move(self, move: MoveRecord) -> None:
        """Keep the room that a move frees, which a leader before this one may have begun."""
        model = self.fleet.model(move.for_model)
        is_new = claimed_bytes(self.fleet, move.for_model, move.worker_id) is None
        if model is not None and is_new and move.worker_id in self.fleet.records.workers:
            rules = self.fleet.rules_of(move.for_model)
            want = Want(model, Urgency.INTERACTIVE, move.began_unix_s, rules=rules)
            known = self.fleet.claims.of(move.for_model, None)
            workers = {move.worker_id, *(known.bytes_by_worker if known else ())}
            self.claim(want, workers, self.now_unix_s + CLAIM_S)

    def forget(self, model: ModelName) -> None:
        """Note that a model wants nothing more; its decision goes with one that was removed."""
        self.fleet.blocked.pop(model, None)
        self.fleet.lines.leave(model)
        self.fleet.promises.pop(model, None)
        self.fleet.dirty_workers |= self.fleet.claims.keep(model, ())
        records = self.fleet.records
        if model in records.decisions and model not in records.models:
            self.actions.append(Undecide(model))

    def keep_claims(self, model: ModelName, sites: Collection[Site]) -> None:
        """Give up what a model claims for replicas that it wants no more.

        What running moves free for it is claimed without a node, by whichever leader.
        """
        moves, index = self.fleet.records.moves, self.fleet.index
        is_freed = any(moves[key].for_model == model for key in index.moves.get(model, ()))
        kept = {*sites, None} if is_freed else sites
        self.fleet.dirty_workers |= self.fleet.claims.keep(model, kept)

    def forget_want(self, want: Want, workers: Collection[WorkerId]) -> None:
        """Note that a want got its place; what its model claims for others stays."""
        claims, model = self.fleet.claims, want.model.name
        self.fleet.blocked.pop(model, None)
        self.fleet.lines.leave(model)
        self.fleet.promises.pop(model, None)
        touched = claims.drop(model, want.node_id) | claims.drop_at(model, workers)
        self.fleet.dirty_workers |= touched

    def refresh(self) -> None:
        """Have what was assumed count for what is looked at next."""
        self.fleet.refresh(self.scene.policy, self.now_unix_s)

    def stands(self, model: ModelName, decision: str, reason: str) -> bool:
        """Whether this is a wait that is written down already, for the same reason."""
        last = self.fleet.records.decisions.get(model)
        is_known = last is not None and (last.decision, last.reason) == (decision, reason)
        return decision == "wait" and is_known

    def decide(
        self,
        model: ModelName,
        decision: str,
        reason: str,
        *,
        worker_id: str = "",
        predicted_start_s: float = 0.0,
        rejected: Rejected = (),
    ) -> None:
        """Note a decision, unless it is a wait that stands already for the same reason."""
        if self.stands(model, decision, reason):
            return
        self.actions.append(
            Decide(
                DecisionRecord(
                    model,
                    self.now_unix_s,
                    decision,
                    reason,
                    worker_id,
                    predicted_start_s,
                    rejected,
                )
            )
        )
