"""Names of a model's two streams, one for each class of jobs, of their group and their entries."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from gearfall.core.generation.job import Priority
from gearfall.core.ids import ModelName
from gearfall.infra.queue.redis_wire import Command

GROUP = b"workers"

LANES = (Priority.INTERACTIVE, Priority.BATCH)
"""In the order in which they are claimed from."""

Row = tuple[Priority, bytes, int, dict[bytes, bytes]]
"""Lane, id, deliveries and fields of an entry."""

_KEY_ENDS = {Priority.INTERACTIVE: "", Priority.BATCH: ":batch"}  # no model's name has a colon
_ENTRY_ENDS = {Priority.INTERACTIVE: "", Priority.BATCH: "/batch"}


def stream_key(prefix: str, model: ModelName, lane: Priority) -> str:
    """Return the key of a model's stream."""
    return prefix + model + _KEY_ENDS[lane]


def group_creation(key: str) -> Command:
    """Return what makes a stream with its group, from its first entry on; an error if it has it."""
    return "XGROUP", "CREATE", key, GROUP, "0", "MKSTREAM"


def name_entry(raw_id: bytes, lane: Priority) -> str:
    """Return what an entry is called outside of Redis."""
    return raw_id.decode() + _ENTRY_ENDS[lane]


def find_entry(entry_id: str) -> tuple[Priority, str]:
    """Return the lane of an entry and its id there."""
    raw_id, _, end = entry_id.partition("/")
    return (Priority.BATCH if end else Priority.INTERACTIVE), raw_id


def ids_by_lane(entry_ids: Iterable[str]) -> dict[Priority, list[str]]:
    """Return the ids in each lane that has any."""
    found: defaultdict[Priority, list[str]] = defaultdict(list)
    for entry_id in entry_ids:
        lane, raw_id = find_entry(entry_id)
        found[lane].append(raw_id)
    return found


def row_of(lane: Priority, row: Sequence[Any]) -> Row:
    """Return an entry from a script's row, whose fields are a flat list."""
    raw_id, deliveries, flat = row
    return lane, raw_id, deliveries, dict(zip(flat[::2], flat[1::2], strict=True))
