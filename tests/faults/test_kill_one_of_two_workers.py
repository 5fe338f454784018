"""kill -9 of one of two workers in mid-stream: the other goes on while the lease still runs."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gearfall.cli.demo import prepare
from gearfall.client import AsyncClient
from gearfall.infra.failpoints import DIRECTORY_VARIABLE
from gearfall.pb import common_pb2
from tests.cluster_host import ClusterHost
from tests.faults.test_kill_engine import MODEL, read


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[ClusterHost, AsyncClient]]:
    """A cluster with two workers on one node, and a client."""
    points = tmp_path / "points"
    points.mkdir()
    environment = {DIRECTORY_VARIABLE: str(points)}
    host = ClusterHost(tmp_path / "home", "--workers-per-node", "2", environment=environment)
    try:
        prepare(host.addresses["grpc"], quiet=True)
        async with AsyncClient(host.addresses["grpc"]) as client:
            yield host, client
    finally:
        assert host.stop() == 0


async def owner(client: AsyncClient) -> tuple[str, str]:
    """Return id and address of the worker with the ready replica."""
    return next(
        (worker.worker_id, worker.address)
        for worker in (await client.status()).workers
        for replica in worker.replicas
        if replica.model == MODEL and replica.state == common_pb2.REPLICA_STATE_READY
    )


async def test_the_other_worker_takes_over_while_the_lease_still_runs(
    pair: tuple[ClusterHost, AsyncClient],
) -> None:
    host, client = pair
    expected_ids, expected_text, _ = await read(client)
    dead, address = await owner(client)
    pid = next(facts.pid for facts in host.facts.services if facts.address == address)
    host.arm(f"worker.push[model={MODEL},pid={pid}]=kill@20")
    ids, text, owners = await read(client)
    assert (ids, text) == (expected_ids, expected_text)
    assert owners == 2
    messages = [(line["message"], line.get("worker")) for line in host.log_lines("scheduler")]
    down = messages.index(("worker link", dead))
    moves = [worker for message, worker in messages[down:] if message == "assigned"]
    assert moves
    assert dead not in moves
    explained = (await client.explain_model(MODEL)).explanations
    rejected = {(r.choice, r.reason) for e in explained for r in e.rejected}
    assert (f"worker {dead}", "its connection is broken") in rejected
