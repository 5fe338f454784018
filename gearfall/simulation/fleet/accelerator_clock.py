"""How long accelerators hosted anything: what a fleet costs while it runs."""

from collections import Counter
from collections.abc import Mapping

from gearfall.core.ids import WorkerId


class AcceleratorClock:
    """Owner of each worker's time with at least one replica on it."""

    def __init__(self, accelerators: Mapping[WorkerId, int]) -> None:
        """`accelerators`: that each worker stands for."""
        self._accelerators = accelerators
        self._hosted: Counter[WorkerId] = Counter()
        self._since_s: dict[WorkerId, float] = {}
        self._ended_s = 0.0

    def hosts_more(self, worker_id: WorkerId, now_s: float) -> None:
        """A replica came to be on a worker."""
        self._hosted[worker_id] += 1
        self._since_s.setdefault(worker_id, now_s)

    def hosts_less(self, worker_id: WorkerId, now_s: float) -> None:
        """One is gone."""
        assert self._hosted[worker_id] > 0, f"{worker_id} hosts nothing"
        self._hosted[worker_id] -= 1
        if self._hosted[worker_id] == 0:
            self._ended_s += self._spent_s(worker_id, self._since_s.pop(worker_id), now_s)

    def used_s(self, now_s: float) -> float:
        """Return accelerators times seconds so far."""
        running = (self._spent_s(each, since, now_s) for each, since in self._since_s.items())
        return self._ended_s + sum(running)

    def _spent_s(self, worker_id: WorkerId, since_s: float, now_s: float) -> float:
        return (now_s - since_s) * self._accelerators[worker_id]
