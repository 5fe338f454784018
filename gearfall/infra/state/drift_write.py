"""Writes what routers find about a plan's promises: joined with what others found, not over it."""

import contextlib

from gearfall.core.errors import Conflict
from gearfall.core.gears.drift import joined
from gearfall.core.gears.gear_records import DriftRecord
from gearfall.core.ports import ClusterState, StateEntry
from gearfall.infra.state.cluster_keys import (
    UndecodableError,
    decode_entry,
    encode_record,
    key_of_record,
)


async def put_joined(state: ClusterState, record: DriftRecord) -> int:
    """Write `record` and what stands there, as one, and return the revision."""
    key = key_of_record("drift", record)
    while True:
        entry = await state.get(key)
        found = None if entry is None else _drift_in(entry, len(record.thresholds))
        known = record if found is None else joined(found, record)
        revision = 0 if entry is None else entry.mod_revision
        with contextlib.suppress(Conflict):  # another router came between
            return await state.compare_and_set(
                key, encode_record(known), expected_mod_revision=revision
            )


def _drift_in(entry: StateEntry, thresholds: int) -> DriftRecord | None:
    """Return the entry's record; None for one that is broken, which may be written over."""
    try:
        record = decode_entry(entry.key, entry.value)[2]
    except UndecodableError:
        return None
    if isinstance(record, DriftRecord) and len(record.thresholds) == thresholds:
        return record
    return None
