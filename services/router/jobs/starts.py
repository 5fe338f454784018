"""How long a cold model will take to start, and which models can't: from cluster records alone."""

from collections.abc import Iterable

from gearfall.core.ids import ModelName
from gearfall.core.origin import UNKNOWN_BYTES_PER_S, bandwidth_out_of, source_tier
from gearfall.core.records import (
    AssignmentRecord,
    ModelRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
)
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier

FAILURES_IN_A_ROW = 3
"""Failed starts without a ready replica between them after which a model counts as broken."""
_DEFAULT_PROCESS_S = 1.0
"""Attach, process, build and first token together, before anything was measured."""


class StartHistory:
    """What past starts took and how they ended. Fed with the replicas of each new view."""

    def __init__(self) -> None:
        self._timelines: dict[ModelName, StartTimeline] = {}
        self._failures: dict[ModelName, int] = {}
        self._states: dict[tuple[str, ModelName], ReplicaState] = {}
        self._errors: dict[ModelName, str] = {}
        self._hopeful: frozenset[ModelName] = frozenset()
        """Models with a replica that is ready or on its way up for the first time."""

    def observe(self, replicas: Iterable[ReplicaRecord]) -> frozenset[ModelName]:
        """Take note of all replicas there are; return the models that became broken."""
        present = tuple(replicas)
        were_broken = frozenset(filter(self.error_of, self._failures))
        states: dict[tuple[str, ModelName], ReplicaState] = {}
        for replica in present:
            key = (replica.worker_id, replica.model)
            states[key] = replica.state
            if replica.state is ReplicaState.READY:
                if _process_s(replica.timeline) > 0:
                    self._timelines[replica.model] = replica.timeline
                self._failures.pop(replica.model, None)
            elif replica.state is ReplicaState.FAILED and self._states.get(key) != replica.state:
                self._failures[replica.model] = self._failures.get(replica.model, 0) + 1
                self._errors[replica.model] = replica.error or "unknown"
        self._states = states
        self._hopeful = frozenset(each.model for each in present if _is_hopeful(each))
        self._forget_absent()
        return frozenset(filter(self.error_of, self._failures)) - were_broken

    def error_of(self, model: ModelName) -> str | None:
        """Why the model can't start, if it is broken."""
        is_broken = self._failures.get(model, 0) >= FAILURES_IN_A_ROW
        return self._errors[model] if is_broken and model not in self._hopeful else None

    def process_s(self, model: ModelName) -> float:
        """Seconds from resident bytes to the first token: measured, else those of other models."""
        timeline = self._timelines.get(model)
        if timeline is not None:
            return _process_s(timeline)
        known = [_process_s(each) for each in self._timelines.values()]
        return sorted(known)[len(known) // 2] if known else _DEFAULT_PROCESS_S

    def _forget_absent(self) -> None:
        """A model whose replicas are all gone gets a new chance."""
        present = {model for _, model in self._states}
        for model in [each for each in self._failures if each not in present]:
            del self._failures[model]


def _is_hopeful(replica: ReplicaRecord) -> bool:
    if replica.state is ReplicaState.READY:
        return True
    is_on_its_way = replica.state in (ReplicaState.LOADING, ReplicaState.STARTING)
    return is_on_its_way and not replica.error


def _process_s(timeline: StartTimeline) -> float:
    return (
        timeline.device_s
        + timeline.attach_s
        + timeline.process_s
        + timeline.build_s
        + timeline.first_token_s
    )


def is_ready(model: ModelName, replicas: Iterable[ReplicaRecord]) -> bool:
    """Whether a replica of the model takes jobs."""
    return any(each.model == model and each.state is ReplicaState.READY for each in replicas)


def expected_start_s(
    model: ModelRecord,
    *,
    nodes: Iterable[NodeRecord],
    assignments: Iterable[AssignmentRecord],
    history: StartHistory,
    now_unix_s: float,
) -> float:
    """Seconds to the first token of a model without a ready replica.

    A start under way: what is left of its prediction. Else the best node's q + n / b with n the
    model's bytes (0 when they are resident) and b the measured bandwidth of the tier that they come
    out of there, plus process and first-token time (ServerlessLLM, section 6.1).
    """
    process_s = history.process_s(model.name)
    under_way = [
        max(each.assigned_unix_s + each.predicted_start_s - now_unix_s, 0.05)
        for each in assignments
        if each.model == model.name and each.predicted_start_s > 0
    ]
    if under_way:
        return min(under_way)
    by_id = {node.node_id: node for node in nodes}
    tiers = [(source_tier(model, node, by_id), node) for node in by_id.values()]
    loads = [_load_s(model, tier, node) for tier, node in tiers if tier is not None]
    if not loads:
        return model.size_bytes / UNKNOWN_BYTES_PER_S[Tier.SSD] + process_s
    return min(loads) + process_s


def _load_s(model: ModelRecord, tier: Tier, node: NodeRecord) -> float:
    if tier is Tier.DRAM:
        return 0.0
    return model.size_bytes / bandwidth_out_of(tier, node).bytes_per_s
