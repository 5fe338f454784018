"""What decides whether a worker can host a model, as columns of numbers over all workers.

A decision that has to look at every worker looks at these arrays. A row that is free, or belongs to
a worker that takes nothing, has room for no replica.
"""

from operator import gt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gearfall.core.ids import WorkerId

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]

_FIRST_CAPACITY = 64


class WorkerRow(NamedTuple):
    """One worker's numbers. Room is given as bytes and as replicas that may be added."""

    free_bytes: float = 0.0
    free_replicas: float = 0.0
    """Now."""
    idle_bytes: float = 0.0
    idle_replicas: float = 0.0
    """Once what is leaving has left and all that idles, or does batch work only, had to go."""
    busy_bytes: float = 0.0
    busy_replicas: float = 0.0
    """Once what is busy, comes up or has to stay a while had moved elsewhere or ended as well."""
    used_bytes: float = 0.0
    pool_bytes: float = 0.0
    """Largest model that the node's store can hold."""
    remote_s_per_byte: float = 0.0
    remote_queued_s: float = 0.0
    ssd_s_per_byte: float = 0.0
    ssd_queued_s: float = 0.0
    """Of the node: out of each tier, and until the loads asked for before are done."""
    slots: float = 0.0
    """Jobs at once of one replica, on which its memory depends."""
    node: float = -1.0
    """Number of the node."""

    def offers_more_than(self, other: "WorkerRow") -> bool:
        """Whether some model may fit here that did not fit before."""
        return any(map(gt, self[:6], other[:6]))


_FIELDS = {name: number for number, name in enumerate(WorkerRow._fields)}


class WorkerRows:
    """Owner of the columns."""

    def __init__(self) -> None:
        self._data = np.zeros((len(_FIELDS), _FIRST_CAPACITY))
        self._row_of: dict[WorkerId, int] = {}
        self._worker_at: list[WorkerId | None] = []
        self._rows: list[WorkerRow] = []
        """The same numbers once more: one worker's are looked up far more often than changed."""
        self._free: list[int] = []
        self._node_numbers: dict[str, int] = {}
        self._kinds_of_slots: dict[float, int] = {}

    def __len__(self) -> int:
        """Rows, the free ones included."""
        return len(self._worker_at)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._row_of

    def column(self, name: str) -> Floats:
        """Return a column by its name in WorkerRow; it is a view, not to be changed."""
        return self._data[_FIELDS[name], : len(self._worker_at)]

    def put(self, worker_id: WorkerId, row: WorkerRow) -> int:
        """Set a worker's row and return where it is."""
        number = self._row_of.get(worker_id)
        if number is None:
            number = self._add(worker_id)
        elif row == (before := self._rows[number]):
            return number
        else:
            self._forget_slots(before.slots)
        self._data[:, number] = self._rows[number] = row
        self._kinds_of_slots[row.slots] = self._kinds_of_slots.get(row.slots, 0) + 1
        return number

    def drop(self, worker_id: WorkerId) -> None:
        """Free a worker's row, if it has one."""
        number = self._row_of.pop(worker_id, None)
        if number is not None:
            self._forget_slots(self._rows[number].slots)
            self._data[:, number] = self._rows[number] = WorkerRow()
            self._worker_at[number] = None
            self._free.append(number)

    def get(self, worker_id: WorkerId) -> WorkerRow:
        """Return a worker's row; an empty one for a worker without."""
        number = self._row_of.get(worker_id)
        return WorkerRow() if number is None else self._rows[number]

    def number_of(self, worker_id: WorkerId) -> int | None:
        """Return where a worker's row is."""
        return self._row_of.get(worker_id)

    def worker_at(self, number: int) -> WorkerId:
        """Return whose row it is."""
        worker_id = self._worker_at[number]
        assert worker_id is not None, "a free row has no room and is never chosen"
        return worker_id

    def number_of_node(self, node_id: str) -> int:
        """Return a number that stands for the node in the columns, for as long as they live."""
        return self._node_numbers.setdefault(node_id, len(self._node_numbers))

    def kinds_of_slots(self) -> tuple[int, ...]:
        """Return which numbers of slots there are."""
        return tuple(int(slots) for slots in self._kinds_of_slots)

    def as_dict(self) -> dict[WorkerId, WorkerRow]:
        """Return all rows by worker, for comparison; nodes are numbered as they came."""
        return {worker_id: self.get(worker_id)._replace(node=0.0) for worker_id in self._row_of}

    def _add(self, worker_id: WorkerId) -> int:
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._worker_at)
            self._worker_at.append(None)
            self._rows.append(WorkerRow())
            if number >= self._data.shape[1]:
                self._data = np.concatenate([self._data, np.zeros_like(self._data)], axis=1)
        self._worker_at[number] = worker_id
        self._row_of[worker_id] = number
        return number

    def _forget_slots(self, slots: float) -> None:
        left = self._kinds_of_slots[slots] - 1
        if left:
            self._kinds_of_slots[slots] = left
        else:
            del self._kinds_of_slots[slots]
