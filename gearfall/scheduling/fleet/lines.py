"""Which models wait at a worker until somebody ends there: the line before its next free place."""

from gearfall.core.ids import ModelName, WorkerId


class Lines:
    """Owner of at most one place in line for each model."""

    def __init__(self) -> None:
        self._at: dict[ModelName, WorkerId] = {}
        self._since_unix_s: dict[WorkerId, dict[ModelName, float]] = {}

    def join(self, model: ModelName, worker_id: WorkerId, since_unix_s: float) -> None:
        """Have a model, which has waited for a place since then, wait there and nowhere else."""
        self.leave(model)
        self._at[model] = worker_id
        self._since_unix_s.setdefault(worker_id, {})[model] = since_unix_s

    def leave(self, model: ModelName) -> None:
        """Have a model wait in no line."""
        worker_id = self._at.pop(model, None)
        if worker_id is not None:
            line = self._since_unix_s[worker_id]
            del line[model]
            if not line:
                del self._since_unix_s[worker_id]

    def place_of(self, model: ModelName) -> WorkerId | None:
        """Return the worker in whose line a model waits; None for one that waits in none."""
        return self._at.get(model)

    def is_first(self, model: ModelName, worker_id: WorkerId, since_unix_s: float) -> bool:
        """Whether nobody else there has waited as long as a model that came at that time."""
        line = self._since_unix_s.get(worker_id, {})
        return all(since > since_unix_s for other, since in line.items() if other != model)
