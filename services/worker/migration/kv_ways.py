"""Which way keys and values go to a target: its bulk socket, unless it was barred. Pure."""

from services.worker.migration.cost import DataPath

RETRY_S = 60.0
"""So long after a target's bulk socket could not be connected it is not tried again."""


class KvWays:
    """Owner of what is known about the sockets of one worker's targets."""

    def __init__(self) -> None:
        self._barred_until_s: dict[str, float] = {}

    def path_to(self, target: str, now_s: float) -> DataPath:
        """Return the way to try."""
        is_barred = now_s < self._barred_until_s.get(target, now_s)
        return DataPath.KV_STREAM if is_barred else DataPath.KV

    def note(self, target: str, tried: DataPath, taken: DataPath, now_s: float) -> None:
        """A migration was to go one way and went another."""
        if (tried, taken) == (DataPath.KV, DataPath.KV_STREAM):
            self._barred_until_s[target] = now_s + RETRY_S
