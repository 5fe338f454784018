"""Room that is being made for a model: nobody else takes it, for a while."""

from collections.abc import Mapping
from dataclasses import dataclass

from gearfall.core.ids import ModelName, WorkerId
from gearfall.scheduling.due_times import DueTimes


@dataclass(frozen=True, slots=True)
class Claim:
    """One model's claim on room of some workers."""

    bytes_by_worker: Mapping[WorkerId, int]
    since_unix_s: float
    until_unix_s: float


class Claims:
    """Owner of at most one claim a model. Every change returns the workers concerned."""

    def __init__(self) -> None:
        self._by_model: dict[ModelName, Claim] = {}
        self._on_worker: dict[WorkerId, dict[ModelName, int]] = {}
        self._ends: DueTimes[ModelName] = DueTimes()

    def put(self, model: ModelName, claim: Claim) -> set[WorkerId]:
        """Claim room, in place of what the model claimed before."""
        touched = self.drop(model)
        self._by_model[model] = claim
        self._ends.put(model, claim.until_unix_s)
        for worker_id, size_bytes in claim.bytes_by_worker.items():
            self._on_worker.setdefault(worker_id, {})[model] = size_bytes
            touched.add(worker_id)
        return touched

    def drop(self, model: ModelName) -> set[WorkerId]:
        """Give a model's claim up, if it has one."""
        claim = self._by_model.pop(model, None)
        if claim is None:
            return set()
        self._ends.put(model, None)
        for worker_id in claim.bytes_by_worker:
            del self._on_worker[worker_id][model]
            if not self._on_worker[worker_id]:
                del self._on_worker[worker_id]
        return set(claim.bytes_by_worker)

    def drop_expired(self, now_unix_s: float) -> set[WorkerId]:
        """Give up the claims whose time is over."""
        touched: set[WorkerId] = set()
        for model in self._ends.take(now_unix_s):
            touched |= self.drop(model)
        return touched

    def of(self, model: ModelName) -> Claim | None:
        """Return a model's claim."""
        return self._by_model.get(model)

    def on(self, worker_id: WorkerId) -> Mapping[ModelName, int]:
        """Return the claimed bytes on a worker, by the model that claims them."""
        return self._on_worker.get(worker_id, {})

    def earliest_end(self) -> float | None:
        """Return when the first claim ends."""
        return self._ends.earliest()
