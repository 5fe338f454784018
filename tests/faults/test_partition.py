"""Three nodes in network namespaces of their own, and partitions between them and the rest.

Each case runs as a process inside the hub's namespace, where etcd, Redis and the router are; two
schedulers have a namespace of their own, so that one node can be cut off from them alone.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gearfall.client import AsyncClient
from gearfall.core.ids import DeploymentName, ModelName, NodeId, WorkerId
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from gearfall.demo import catalogue
from gearfall.infra.history_log import HISTORY_VARIABLE, read_histories
from gearfall.infra.local.local_servers import LocalServer, ServerSpec, etcd_spec, redis_spec
from gearfall.infra.local.tether import tethered
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.etcd_state import EtcdState
from tests.faults.namespaces import HUB, Namespaces, address, why_not
from tests.faults.placement_verdict import judge_placement
from tests.faults.state_recorder import recording
from tests.faults.warm_traffic import WarmTraffic

ALL = os.environ.get("GEARFALL_FAULTS") == "all"
INSIDE = "GEARFALL_TEST_NAMESPACES"
"""Set in the process that runs inside: the prefix's process id."""
NODES, SCHEDULERS = (1, 2, 3), 4
MODEL = ModelName("arith-small")
WAIT_S = 60.0

outside = pytest.mark.skipif(
    not ALL or bool(why_not()), reason=why_not() or "runs with `make faults-scheduler`"
)


@outside
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", ["from-schedulers", "from-all"])
def test_a_node_is_cut_off(fault: str, tmp_path: Path) -> None:
    spaces = Namespaces(len(NODES) + 1)
    inner = [sys.executable, "-m", "tests.faults.test_partition", fault, str(tmp_path)]
    try:
        done = subprocess.run(
            spaces.inside(spaces.hub, inner),
            env={**os.environ, INSIDE: str(os.getpid())},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        spaces.close()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


class Members:
    """The servers and services of one cluster, each in its namespace."""

    def __init__(self, home: Path) -> None:
        """Start everything; returns when it serves."""
        self._home = home
        self.histories = home / "histories"
        self.histories.mkdir()
        self._prefix = f"gearfall-{os.environ[INSIDE]}"
        self.etcd = _everywhere(etcd_spec(home / "etcd", is_durable=False))
        self.redis = _everywhere(redis_spec(home / "redis"))
        self._servers = [LocalServer(self.etcd), LocalServer(self.redis)]
        self._processes: list[subprocess.Popen[bytes]] = []
        for server in self._servers:
            server.start()
        self._start([("store", n, self._store(n)) for n in NODES])
        workers = [("worker", n, self._worker(n)) for n in NODES]
        self._start([*workers, *(("scheduler", SCHEDULERS, []) for _ in range(2))])
        (router,) = self._start([("router", 0, ["--rest", f"{HUB}:0"])])
        self.router = str(router["address"])

    def close(self) -> None:
        """Stop everything in reverse order."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        for server in self._servers:
            server.stop()

    def _store(self, number: int) -> Sequence[str]:
        data = str(self._home / f"store-{number}")
        return ["--node-id", f"node-{number}", "--data-dir", data, "--dram-bytes", str(2**28)]

    def _worker(self, number: int) -> Sequence[str]:
        return ["--node-id", f"node-{number}", "--memory-bytes", str(2**31), "--threads", "1"]

    def _start(self, services: Sequence[tuple[str, int, Sequence[str]]]) -> list[dict[str, object]]:
        started = [self._launch(*each) for each in services]
        self._processes += started
        ready = []
        for process in started:
            assert process.stdout is not None
            ready.append(json.loads(process.stdout.readline()))
        return ready

    def _launch(self, service: str, number: int, flags: Sequence[str]) -> subprocess.Popen[bytes]:
        here = address(number) if number else HUB
        shared = ["--etcd", _at_hub(self.etcd), "--redis", _at_hub(self.redis)]
        argv = [sys.executable, "-m", f"services.{service}", *shared, "--listen", f"{here}:0"]
        if number:
            argv = ["ip", "netns", "exec", f"{self._prefix}-{number}", *argv]
        with (self._home / f"{service}-{number}.log").open("ab") as log:
            return subprocess.Popen(
                tethered([*argv, *flags]),
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, HISTORY_VARIABLE: str(self.histories)},
                start_new_session=True,
            )


def _everywhere(spec: ServerSpec) -> ServerSpec:
    """Return the server listening in the whole namespace, not on its loopback alone."""
    argv = list(spec.argv)
    for flag in ("--listen-client-urls", "--bind"):
        if flag in argv:
            at = argv.index(flag) + 1
            argv[at] = argv[at].replace("127.0.0.1", "0.0.0.0")
    is_redis = spec.name == "redis"
    return replace(spec, argv=[*argv, *(["--protected-mode", "no"] if is_redis else [])])


def _at_hub(spec: ServerSpec) -> str:
    return spec.url.replace("127.0.0.1", HUB)


async def judge_fault(members: Members, fault: str) -> None:
    """Cut a node off while its replica is used; nothing fails, and all is well afterwards."""
    state = EtcdState(members.etcd.url)
    cluster = Cluster(state)
    await cluster.start()
    async with AsyncClient(members.router) as client, recording(state) as recorded:
        async for _ in client.register_model(MODEL, str(catalogue.checkpoint_path(MODEL))):
            pass
        name, stages = DeploymentName("one"), (Stage(MODEL),)
        await client.deploy(DeploymentRecord(name, stages, min_replicas=1, max_replicas=1))
        traffic = WarmTraffic(client, MODEL)
        async with traffic.flowing():
            await traffic.after_more(20)
            view = await cluster.wait_until(lambda view: len(serving(view)) == 1, timeout_s=WAIT_S)
            (victim,) = serving(view)
            cut, mend = _fault(fault, view.workers[victim].node_id)
            cut()
            view = await cluster.wait_until(
                lambda view: bool(serving(view) - {victim}), timeout_s=WAIT_S
            )
            if fault == "from-schedulers":
                assert (victim, MODEL) in view.assignments, "nothing of its own is deleted"
            await traffic.after_more(20)
            mend()
            await cluster.wait_until(is_healed, timeout_s=WAIT_S)
            await traffic.after_more(20)
        assert traffic.failures == []
        assert len(traffic.answers[MODEL]) == 1
    verdict = judge_placement(
        recorded, read_histories(members.histories), struck=frozenset({victim})
    )
    assert verdict.is_sound, verdict
    await cluster.stop()
    await state.close()


def _fault(fault: str, node_id: NodeId) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return what cuts a node off, and what undoes it."""
    spaces = Joined(int(os.environ[INSIDE]))
    number = int(node_id.removeprefix("node-"))
    if fault == "from-schedulers":
        return (
            lambda: spaces.cut(SCHEDULERS, number),
            lambda: spaces.mend(SCHEDULERS, number),
        )
    return lambda: spaces.isolate(number), lambda: spaces.rejoin(number)


class Joined(Namespaces):
    """The namespaces that another process made."""

    def __init__(self, pid: int) -> None:
        self._prefix = f"gearfall-{pid}"
        self.members = range(1, len(NODES) + 2)


def serving(view: ClusterView) -> set[WorkerId]:
    """Return the workers with a ready replica of the model."""
    ready = ReplicaState.READY
    return {worker for (worker, _), each in view.replicas.items() if each.state is ready}


def is_healed(view: ClusterView) -> bool:
    """Whether all nodes are there again and one of them alone serves."""
    is_whole = len(view.workers) == len(view.nodes) == len(NODES)
    return is_whole and len(view.replicas) == len(view.assignments) == len(serving(view)) == 1


def main(fault: str, home: str) -> None:
    """Run one case inside the hub's namespace."""
    members = Members(Path(home))
    try:
        asyncio.run(judge_fault(members, fault))
    finally:
        members.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
