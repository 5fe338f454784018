"""What it takes to have a replica elsewhere so that another model may start in its place."""

from dataclasses import replace

import pytest

from gearfall.core.ids import NodeId, WorkerId
from tests.gearfall.scheduling.clusters import MIB, assignment, demand, model, node, worker
from tests.gearfall.scheduling.deciding_cluster import NOW, ROOM, Cluster, busy

SIZE = 400 * MIB
LOAD_S = 8.0


def one_runs_where_the_other_is_in_memory(*, near=(), dram_used_bytes=0):
    """`p`'s bytes are beside worker `a`, where `x` runs; `b` is free and has to read either."""
    names = ("p", "x")
    disk = {"on_ssd": names, "ssd_bytes_per_s": SIZE / LOAD_S}
    other = node("n2", resident=near, **disk)
    return Cluster(
        node("n1", resident=names, **disk),
        replace(other, node_id=NodeId("n2"), dram_used_bytes=dram_used_bytes),
        worker("a", node_id="n1", memory_bytes=ROOM, max_replicas=1),
        worker("b", node_id="n2", memory_bytes=ROOM, max_replicas=1),
        *(model(name, nodes=("n1", "n2"), size_bytes=SIZE) for name in names),
        assignment("x", "a", memory_bytes=ROOM),
        busy("x", "a"),
        demand("p", since=NOW),
    )


FULL = (1 << 30) - 10 * MIB


def test_nobody_moves_to_be_read_where_the_other_could_be_read_itself():
    cluster = one_runs_where_the_other_is_in_memory(dram_used_bytes=FULL)
    assert cluster.step() == [("assign", WorkerId("b"), "p")]


@pytest.mark.parametrize("dram_used_bytes", [SIZE, FULL])
def test_a_job_moves_to_where_its_model_is_in_memory(dram_used_bytes):
    cluster = one_runs_where_the_other_is_in_memory(near=("x",), dram_used_bytes=dram_used_bytes)
    assert cluster.step() == [("move", "a", "x", "b"), ("assign", "b", "x")]
