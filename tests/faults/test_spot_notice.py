"""A preemptible worker is told that it will go while it streams the only replica's answer.

The leader starts the model elsewhere, the running job moves there alive, and only then the noticed
worker's replica is gone.
"""

import os
from collections.abc import Iterator

import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub
from tests.faults.fault_cluster import GREEDY, MODEL, FaultClient, FaultCluster
from tests.faults.placement_verdict import StateChange, judge_placement
from tests.faults.state_recorder import Recorded, recording

pytestmark = pytest.mark.skipif(
    os.environ.get("GEARFALL_FAULTS") != "all", reason="runs with `make faults-scheduler`"
)
NOTICE_S = 30.0
"""Until the machine is taken away."""
PACE = "engine.decode=delay:0.004"
"""So that the answer is still on its way when its next home is ready."""


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    started = FaultCluster(tmp_path_factory.mktemp("spot"))
    verdict = None
    try:
        yield started
    finally:
        verdict = started.close()
    assert verdict.is_sound, verdict


async def test_a_replacement_is_there_before_a_noticed_worker_goes(cluster: FaultCluster) -> None:
    state = EtcdState(cluster.host.facts.etcd_url)
    replies: list[tuple[str, pb.DrainReply]] = []
    async with (
        AsyncClient(cluster.host.addresses["grpc"]) as opened,
        recording(state) as recorded,
    ):
        async for _ in opened.register_model(MODEL, str(cluster.source)):
            pass
        name, stages = DeploymentName("one"), (Stage(MODEL),)
        await opened.deploy(DeploymentRecord(name, stages, min_replicas=1, max_replicas=1))
        client = FaultClient(cluster, opened, cluster.log)
        expected = await client.read(GREEDY)

        async def notice() -> None:
            (hosting,) = [
                worker
                for worker in (await opened.status()).workers
                if any(replica.model == MODEL for replica in worker.replicas)
            ]
            async with open_channel(hosting.address) as channel:
                request = pb.DrainRequest(deadline_s=NOTICE_S)
                reply = await WorkerStub(channel).Drain(request, timeout=NOTICE_S + 10)
            replies.append((hosting.worker_id, reply))

        cluster.arm(PACE)
        received = await client.read(GREEDY, at=40, then=notice)
    await state.close()
    ((noticed, reply),) = replies
    assert (received.token_ids, received.error) == (expected.token_ids, None)
    assert (reply.migrated_jobs, list(reply.lost_job_ids)) == (1, [])
    assert first_ready_elsewhere(recorded, noticed) < gone_from(recorded, noticed)
    verdict = judge_placement(recorded)
    assert verdict.is_sound, verdict


def changes_of_replicas(recorded: Recorded) -> list[StateChange]:
    return [
        change
        for change in recorded
        if isinstance(change, StateChange)
        and change.kind == "replicas"
        and change.record_id[1] == ModelName(MODEL)
    ]


def first_ready_elsewhere(recorded: Recorded, noticed: str) -> int:
    """Return the revision at which another worker served the model for the first time."""
    return min(
        change.revision
        for change in changes_of_replicas(recorded)
        if change.record_id[0] != noticed
        and change.record is not None
        and change.record.state is ReplicaState.READY
    )


def gone_from(recorded: Recorded, noticed: str) -> int:
    """Return the revision at which the noticed worker's replica was gone."""
    return max(
        change.revision
        for change in changes_of_replicas(recorded)
        if change.record_id[0] == noticed and change.record is None
    )
