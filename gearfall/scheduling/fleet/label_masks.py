"""Which workers' labels match, for the few sets of labels that deployments ask for."""

import numpy as np

from gearfall.core.records import WorkerRecord
from gearfall.scheduling.fleet.wants import PlacementRules
from gearfall.scheduling.fleet.worker_rows import Mask

Labels = tuple[tuple[str, str], ...]


class LabelMasks:
    """Owner of one mask over rows per set of labels that was asked for."""

    def __init__(self) -> None:
        self._masks: dict[Labels, Mask] = {}

    def get(self, labels: Labels, rows: int) -> Mask | None:
        """Return the mask over `rows` rows; None for labels that were not asked for before."""
        mask = self._masks.get(labels)
        if mask is None:
            return None
        if len(mask) < rows:
            mask = np.concatenate([mask, np.zeros(rows, dtype=np.bool_)])
            self._masks[labels] = mask
        return mask[:rows]

    def add(self, labels: Labels, rows: int) -> Mask:
        """Begin a mask of False for new labels; the caller fills it by `note`."""
        self._masks[labels] = np.zeros(max(rows, 1), dtype=np.bool_)
        return self._masks[labels][:rows]

    def note(self, number: int, worker: WorkerRecord) -> None:
        """A worker's row was made anew."""
        for labels, mask in self._masks.items():
            if number >= len(mask):
                mask = np.concatenate([mask, np.zeros(number + 1, dtype=np.bool_)])  # noqa: PLW2901
                self._masks[labels] = mask
            mask[number] = PlacementRules(labels).allow(worker)
