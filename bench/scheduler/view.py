"""What one changed record costs whoever follows cluster state, by how many records there are.

Each round puts every replica once more; the view is read after every change (`read each`), or once
a hundred changes, as a loop does that wakes for several at a time.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.table import Table

from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.ports import KeyPut, Snapshot, StateEntry
from gearfall.core.records import ReplicaRecord, ReplicaState
from gearfall.infra.state.cluster_keys import encode_record
from gearfall.infra.state.cluster_view import ViewBuilder

_REPLICA = ReplicaRecord(
    worker_id=WorkerId("w0"),
    node_id=NodeId("n0"),
    model=ModelName("m"),
    state=ReplicaState.READY,
    slots=16,
    running_jobs=0,
    pid=1,
    memory_bytes=2**30,
    idle_since_unix_s=1.0,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.scheduler view")
    parser.add_argument("--records", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--changes", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args(argv)
    table = Table("records", "us a change, view read each", "us a change, read every 100th")
    for records in settings.records:
        entries = _entries(records)
        often = [_change_us(entries, settings.changes, 1) for _ in range(settings.rounds)]
        seldom = [_change_us(entries, settings.changes, 100) for _ in range(settings.rounds)]
        table.add_row(f"{records:,}", f"{median(often):.1f}", f"{median(seldom):.1f}")
    Console().print(table)


def _entries(records: int) -> list[StateEntry]:
    made = [replace(_REPLICA, worker_id=WorkerId(f"w{number}")) for number in range(records)]
    return [
        StateEntry(f"replicas/{each.worker_id}/m", encode_record(each), 1, number + 1)
        for number, each in enumerate(made)
    ]


def _change_us(entries: Sequence[StateEntry], changes: int, read_every: int) -> float:
    builder = ViewBuilder()
    builder.apply(Snapshot(tuple(entries), len(entries)))
    began_s = time.perf_counter()
    for number in range(changes):
        builder.apply(KeyPut(entries[number % len(entries)]))
        if number % read_every == 0:
            assert len(builder.view.replicas) == len(entries)
    return 1e6 * (time.perf_counter() - began_s) / changes
