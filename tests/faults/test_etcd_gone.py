"""etcd stopped, compacted and wiped under a whole cluster that is being used.

Warm traffic goes on without one failed or changed answer, cold models start again afterwards, and
what was forgotten is known again. The normal run stops etcd for longer than every lease lasts;
`make faults-scheduler` stops it for a minute.
"""

import asyncio
import os
import shutil
from collections.abc import Iterator

import pytest

from gearfall.cli.demo import prepare
from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import ReplicaState
from gearfall.demo import catalogue
from gearfall.infra.history_log import HISTORY_VARIABLE, read_histories
from gearfall.infra.local.local_servers import LocalServer, start_etcd
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.etcd_rpc import invoke, rpc
from gearfall.infra.state.etcd_state import EtcdState
from tests.cluster_host import ClusterHost
from tests.faults.fault_cluster import until
from tests.faults.placement_verdict import judge_placement
from tests.faults.state_recorder import recording
from tests.faults.warm_traffic import PROMPT, WarmTraffic

ALL = os.environ.get("GEARFALL_FAULTS") == "all"
STOPPED_S = 60.0 if ALL else 6.0
WARM = ("arith-small", "arith")
"""A model and a cascade, both used all the time."""


class Site:
    """A cluster of real processes on an etcd that the test owns."""

    def __init__(self, etcd: LocalServer, host: ClusterHost) -> None:
        self.etcd = etcd
        self.host = host

    async def strike(self, fault: str) -> None:
        """Do what the fault is, to its end."""
        if fault == "compacted":
            await compact(self.etcd.url)
            return
        await asyncio.to_thread(self.etcd.kill)
        if fault == "wiped":
            shutil.rmtree(self.etcd.spec.directory / "etcd")
        else:
            await asyncio.sleep(STOPPED_S)
        # Its process ends with the thread that starts it, so this one does.
        self.etcd.start()


async def compact(url: str) -> None:
    """Have etcd forget all history."""
    state = EtcdState(url)
    revision = (await state.list("")).revision
    request = rpc.CompactionRequest(revision=revision, physical=True)
    await invoke(state._stubs.kv.Compact, request, timeout_s=5.0)
    await state.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("etcd-gone")
    histories = home / "histories"
    histories.mkdir()
    etcd = start_etcd(home / "etcd", is_durable=False)
    environment = {HISTORY_VARIABLE: str(histories)}
    flags = ("--etcd", etcd.url, "--schedulers", "2")
    host = ClusterHost(home / "home", *flags, environment=environment)
    try:
        prepare(host.addresses["grpc"], quiet=True)
        yield Site(etcd, host)
    finally:
        status = host.stop()
        etcd.stop()
    assert status == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["stopped", "compacted", "wiped"])
async def test_warm_traffic_goes_on_and_state_heals(site: Site, fault: str) -> None:
    state = EtcdState(site.etcd.url)
    cluster = Cluster(state)
    await cluster.start()
    async with AsyncClient(site.host.addresses["grpc"]) as client, recording(state) as recorded:
        traffic = WarmTraffic(client, *WARM)
        async with traffic.flowing():
            await traffic.after_more(10)
            losses = cluster.view.losses
            await site.strike(fault)
            await noticed(cluster, state, losses + (fault == "wiped"))
            await healed(cluster)
            await traffic.after_more(10)
            cold = ModelName(f"cold-after-{fault}")
            async for _ in client.register_model(cold, str(catalogue.checkpoint_path(WARM[0]))):
                pass
            answer = await client.generate(cold, PROMPT, temperature=0.0, max_tokens=8)
        assert traffic.failures == []
        assert {name: len(texts) for name, texts in traffic.answers.items()} == dict.fromkeys(
            WARM, 1
        )
        assert {answer.text} == traffic.answers[WARM[0]]
    verdict = judge_placement(recorded, read_histories(site.host.home.parent / "histories"))
    assert verdict.is_sound, verdict
    await cluster.stop()
    await state.close()


async def noticed(cluster: Cluster, state: EtcdState, losses: int) -> None:
    """Return when the view shows what state is now, after so many losses in all."""
    async with asyncio.timeout(30):
        async for _ in cluster.changes():
            if cluster.view.losses == losses:
                break
    now = await until(lambda: state.list("leader"), bool)
    await cluster.wait_seen(now.revision, timeout_s=30.0)
    assert cluster.view.losses == losses


async def healed(cluster: Cluster) -> None:
    """Return when all that is known in a cluster at rest is known again."""

    def is_whole(view: ClusterView) -> bool:
        ready = {
            key
            for key, each in view.replicas.items()
            if each.state is ReplicaState.READY and not each.is_adrift
        }
        return (
            view.leader is not None
            and len(view.schedulers) == 2
            and len(view.workers) == len(view.nodes) == len(view.routers) == 1
            and set(catalogue.checkpoint_paths()) <= set(view.models)
            and DeploymentName("arith") in view.deployments
            and any(model == WARM[0] for _, model in ready)
            and ready <= view.assignments.keys()
        )

    await cluster.wait_until(is_whole, timeout_s=60.0)
