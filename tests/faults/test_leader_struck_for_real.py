"""A whole cluster with two schedulers: the leader is struck while somebody waits for a cold model.

The answer comes all the same, with the leases that a cluster has by default.
"""

import itertools
import logging
import os
import time
from collections.abc import Iterator
from itertools import product

import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import ModelName
from gearfall.demo import catalogue
from gearfall.infra.history_log import read_histories
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from tests.faults.fault_cluster import FaultCluster, thaw
from tests.faults.placement_verdict import judge_placement
from tests.faults.state_recorder import recording
from tests.faults.warm_traffic import PROMPT

pytestmark = pytest.mark.skipif(
    os.environ.get("GEARFALL_FAULTS") != "all", reason="runs with `make faults-scheduler`"
)
CHECKPOINT = str(catalogue.checkpoint_path("arith-small"))
_log = logging.getLogger(__name__)
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    started = FaultCluster(tmp_path_factory.mktemp("leader"), "--schedulers", "2")
    verdict = None
    try:
        yield started
    finally:
        verdict = started.close()
    assert verdict.is_sound, verdict


@pytest.mark.parametrize(
    ("point", "signal"),
    list(product(["assign.before", "assign.after", "decide.before"], ["kill", "stop"])),
)
async def test_who_waits_for_a_cold_model_is_answered(
    cluster: FaultCluster, point: str, signal: str
) -> None:
    state = EtcdState(cluster.host.facts.etcd_url)
    view = Cluster(state)
    await view.start()
    cold = ModelName(f"cold-{next(_numbers)}")
    async with AsyncClient(cluster.host.addresses["grpc"]) as client, recording(state) as recorded:
        cluster.arm()
        async for _ in client.register_model(cold, CHECKPOINT):
            pass
        await schedulers_there(view)
        rule = f"scheduler.{point}[model={cold}]={signal}@1"
        cluster.arm(rule)
        began_s = time.perf_counter()
        answer = await client.generate(cold, PROMPT, temperature=0.0, max_tokens=8)
        waited_s = time.perf_counter() - began_s
        assert cluster.last_struck_point() == f"scheduler.{point}"
        if signal == "stop":
            thaw(cluster.last_struck())
        expected = await client.generate(cold, PROMPT, temperature=0.0, max_tokens=8)
        await schedulers_there(view)
    assert answer.text == expected.text
    verdict = judge_placement(recorded, read_histories(cluster.histories))
    assert verdict.is_sound, verdict
    _log.info("%s %s: answered after %.2f s", point, signal, waited_s)
    await view.stop()
    await state.close()


async def schedulers_there(cluster: Cluster) -> None:
    """Return when two schedulers are there and one of them leads."""
    async for _ in cluster.changes():
        if cluster.view.leader is not None and len(cluster.view.schedulers) == 2:
            return
