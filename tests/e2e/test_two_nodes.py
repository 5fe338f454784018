"""Two nodes: one's store feeds the other's, and one's workers are emptied into the other's."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from gearfall.cli.main import app
from gearfall.client import AsyncClient, Finished, Started, TextDelta
from gearfall.core.ids import DeploymentName, ModelName, NodeId
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.demo.migrate import DEPLOYMENT, MODEL, OPTIONS, PROMPT, TOKENS, wait_ready
from gearfall.infra.failpoints import RULES_VARIABLE
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub
from tests.cluster_host import ClusterHost

NAME = ModelName("arith")
LATEST_S = 30.0
SLOWLY = {RULES_VARIABLE: "engine.decode=delay:0.02"}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterHost]:
    """Two nodes with a worker each."""
    home = tmp_path_factory.mktemp("nodes") / "home"
    host = ClusterHost(home, "--nodes", "2", environment=SLOWLY)
    yield host
    assert host.stop() == 0


@pytest.fixture
async def client(nodes: ClusterHost) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(nodes.addresses["grpc"]) as opened:
        yield opened


@pytest.fixture
async def cluster(nodes: ClusterHost) -> AsyncIterator[Cluster]:
    """What the services see."""
    state = EtcdState(nodes.facts.etcd_url)
    followed = Cluster(state)
    await followed.start()
    yield followed
    await followed.stop()
    await state.close()


class Reader:
    """Reads an answer of a model that both nodes serve, and drains one of them on the way."""

    def __init__(self, host: ClusterHost, client: AsyncClient, addresses: dict[str, str]) -> None:
        self.host = host
        self.client = client
        self.addresses = addresses

    async def drain(self, node_id: str, deadline_s: float) -> tuple[int, dict[str, Any]]:
        """Run the command; return its exit status and what it printed.

        In this process: another would take longer to start than the answer to end.
        """
        command = ["drain", node_id, "--json", "--deadline", str(deadline_s)]
        server = ["--server", self.host.addresses["grpc"]]
        result = await asyncio.to_thread(CliRunner().invoke, app, [*command, *server])
        (found,) = json.loads(result.stdout)
        return result.exit_code, found

    async def read(self, drain_s: float | None) -> tuple[tuple[Any, ...], int, dict[str, Any]]:
        """Stream the answer; with a deadline, drain its worker on the way.

        One that was handed back is read no further: nobody is left to go on with it.
        """
        ids: list[int] = []
        text, epochs, request_id = "", 0, ""
        draining: asyncio.Task[tuple[int, dict[str, Any]]] | None = None
        events = self.client.stream(DEPLOYMENT, PROMPT, **OPTIONS)
        async for event in events:
            match event:
                case Started():
                    request_id = event.request_id
                case TextDelta():
                    text += event.text
                    ids += [each.token_id for each in event.logprobs]
                    if drain_s is not None and draining is None and len(ids) >= 5:
                        owner = await self.owner(request_id)
                        draining = asyncio.create_task(self.drain(owner, drain_s))
                        if drain_s == 0.0:
                            break
                case Finished():
                    epochs = event.stages[-1].epochs
                case _:
                    pass
        status, found = await draining if draining is not None else (0, {})
        return (ids, text, epochs), status, found

    async def owner(self, request_id: str) -> str:
        """Return the node that runs a request."""
        for address in self.addresses.values():
            async with WorkerDoor(address) as door:
                status = await door.status()
                if any(job.request_id == request_id for job in status.jobs):
                    return status.node_id
        raise AssertionError("nobody runs it")


async def test_the_second_replica_starts_where_the_model_was_not(
    client: AsyncClient, cluster: Cluster
) -> None:
    path = str(catalogue.checkpoint_path("arith-small"))
    _ = [item async for item in client.register_model(NAME, path)]
    address = cluster.view.nodes[NodeId("node-2")].address
    async with grpc.aio.insecure_channel(address) as channel:
        await StoreStub(channel).DeleteModel(store_pb2.DeleteModelRequest(model=NAME), timeout=9)
    await cluster.wait_until(
        lambda view: view.models[NAME].nodes == ("node-1",), timeout_s=LATEST_S
    )

    both = DeploymentRecord(DeploymentName("both"), (Stage(NAME),), min_replicas=2, max_replicas=2)
    await client.deploy(both)
    await cluster.wait_until(lambda view: len(_ready(view)) == 2, timeout_s=LATEST_S)
    assert _ready(cluster.view) == {"node-1", "node-2"}
    await cluster.wait_until(
        lambda view: set(view.models[NAME].nodes) == {"node-1", "node-2"}, timeout_s=LATEST_S
    )

    worker = next(w for w in cluster.view.workers.values() if w.node_id == "node-2")
    reason = cluster.view.assignments[worker.worker_id, NAME].reason
    assert "from remote at 0.25 GB/s (assumed)" in reason
    said = [each.reason for each in (await client.explain_model(NAME)).explanations]
    assert reason in said
    answer = await client.generate("both", "2+3=", temperature=0.0, max_tokens=8)
    assert answer.text == "5"
    await client.remove_deployment("both")


async def test_the_answer_goes_on_elsewhere_and_the_exit_status_says_how(
    nodes: ClusterHost, client: AsyncClient
) -> None:
    path = str(catalogue.checkpoint_path(MODEL))
    _ = [item async for item in client.register_model(MODEL, path)]
    stages = (Stage(MODEL),)
    await client.deploy(DeploymentRecord(DEPLOYMENT, stages, min_replicas=2, max_replicas=2))
    reader = Reader(nodes, client, await wait_ready(client))
    (ids, text, epochs), _, _ = await reader.read(None)
    assert (len(ids), epochs) == (TOKENS, 1)

    moved, status, found = await reader.read(20.0)
    assert moved == (ids, text, 2)
    assert (status, found["migrated_jobs"], found["lost_job_ids"]) == (0, 1, [])
    (report,) = found["migrations"]
    assert report["error"] == ""
    assert report["target_worker_id"] in reader.addresses
    assert report["target_worker_id"] != found["worker_id"]

    (part, _, _), status, found = await reader.read(0.0)
    assert part == ids[: len(part)]
    assert (status, found["migrated_jobs"], len(found["lost_job_ids"])) == (3, 0, 1)


def _ready(view: ClusterView) -> set[str]:
    """Nodes that have a ready replica."""
    replicas = view.replicas.values()
    return {each.node_id for each in replicas if each.state is ReplicaState.READY}
