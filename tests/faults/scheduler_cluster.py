"""Real schedulers on a real etcd, beside workers and a router that are played by the test.

The played ones keep the rules of docs/protocol.md and are as quick as a test wants them: a replica
is ready at once, or busy for as long as the test says.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gearfall.core.generation.history import ProcessHistory, Refused
from gearfall.core.ids import JobId, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.ports import ClusterState, Lease
from gearfall.core.records import (
    DemandRecord,
    LoadRecord,
    ModelRecord,
    NodeRecord,
    ReplicaRecord,
    ReplicaState,
    RunningJob,
    WorkerRecord,
)
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.infra.failpoints import DIRECTORY_VARIABLE, REACHED_FILE, RULES_FILE
from gearfall.infra.history_log import HISTORY_VARIABLE, read_histories
from gearfall.infra.local.local_servers import LocalServer, start_etcd
from gearfall.infra.local.tether import tethered
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_view import ClusterView
from gearfall.infra.state.etcd_state import EtcdState
from tests.faults.placement_verdict import PlacementVerdict, judge_placement
from tests.faults.state_recorder import Recorded, catch_up, recording

LEASE_TTL_S = 2
ROUTER = RouterId("router-a")
MIB = 2**20
WAIT_S = 60.0
"""Longest that anything here is waited for; a test that needs it has failed."""
START_S = 0.05
LONG_JOB = RunningJob(JobId("long"), prompt_tokens=100, output_tokens=10, max_tokens=1_000_000)


class SchedulerCluster:
    """Owner of etcd and of two schedulers, which write histories and can be struck."""

    def __init__(self, home: Path) -> None:
        self.points, self.histories = home / "points", home / "histories"
        self._home = home
        for directory in (self.points, self.histories):
            directory.mkdir(parents=True)
        self.etcd: LocalServer = start_etcd(home / "etcd", is_durable=False)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start_missing()

    def start_missing(self) -> None:
        """Start schedulers that do not run and return when all serve."""
        for process in self._processes.values():
            process.poll()
        missing = [
            name
            for name in ("one", "two")
            if name not in self._processes or self._processes[name].returncode is not None
        ]
        for name in missing:
            self._processes[name] = self._launch(name)
        for name in missing:
            stdout = self._processes[name].stdout
            assert stdout is not None
            assert json.loads(stdout.readline())["ready"]
            stdout.close()

    def close(self) -> None:
        """Stop everything."""
        for process in self._processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self._processes.values():
            assert process.wait(30) in (0, -signal.SIGKILL)
        self.etcd.stop()

    def arm(self, *rules: str) -> None:
        """Put these rules in force in all processes, in place of those before."""
        new = self.points / "new"
        new.write_text("\n".join(rules))
        new.replace(self.points / RULES_FILE)

    def struck(self) -> tuple[dict[str, Any], ...]:
        """Return what fired, in order."""
        path = self.points / REACHED_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(map(json.loads, lines))

    def read_histories(self) -> tuple[ProcessHistory, ...]:
        """Return what the schedulers wrote down so far."""
        return read_histories(self.histories)

    def refused_of(self, pid: int) -> int:
        """Return how many writes of a process met another leader's fence."""
        return sum(isinstance(event, Refused) for event in self._events(pid))

    def _events(self, pid: int) -> list[Any]:
        histories = [each for each in self.read_histories() if each.start.pid == pid]
        return [event for each in histories for event in each.events]

    def _launch(self, name: str) -> subprocess.Popen[bytes]:
        flags = ("--etcd", self.etcd.url, "--lease-ttl", LEASE_TTL_S, "--learn-every", 0.1)
        residency = ("--min-residency", 0, "--residency-per-start", 0, "--keep-alive", 3600)
        argv = [sys.executable, "-m", "services.scheduler", *map(str, (*flags, *residency))]
        environment = {
            DIRECTORY_VARIABLE: str(self.points),
            HISTORY_VARIABLE: str(self.histories),
        }
        with (self._home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                tethered(argv),
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @asynccontextmanager
    async def played(self, *workers: WorkerRecord) -> AsyncIterator["Played"]:
        """Play these workers, their nodes and a router, and record what becomes of the state."""
        state = EtcdState(self.etcd.url)
        cluster = Cluster(state)
        await cluster.start()
        server = await start_server("127.0.0.1:0", lambda _: None, ())
        try:
            async with recording(state) as recorded:
                lease = await state.grant_lease(30.0)
                played = Played(cluster, state, lease, recorded, server.address)
                await played.register(*workers)
                following = asyncio.create_task(played.follow())
                try:
                    yield played
                    assert not following.done(), following.exception()
                    await played.clear()
                finally:
                    following.cancel()
                    await asyncio.wait({following})
                    await lease.revoke()
        finally:
            await server.stop(0)
            await cluster.stop()
            await state.close()

    def judge(self, recorded: Recorded) -> PlacementVerdict:
        """Return the verdict on what was recorded."""
        return judge_placement(recorded, self.read_histories())


class Played:
    """Workers that follow their assignments, and a router that says what it waits for."""

    def __init__(
        self,
        cluster: Cluster,
        state: ClusterState,
        lease: Lease,
        recorded: Recorded,
        address: str,
    ) -> None:
        self.cluster = cluster
        self._state = state
        self._recorded = recorded
        self.busy: set[ModelName] = set()
        """Models whose replicas run a job all the time."""
        self._lease = lease
        self._address = address
        self._starts = 0
        self._arrived = 0

    @property
    def view(self) -> ClusterView:
        """The state as it is now."""
        return self.cluster.view

    async def recorded(self) -> Recorded:
        """What became of the state until now."""
        await catch_up(self._state, self._recorded)
        return list(self._recorded)

    async def register(self, *workers: WorkerRecord) -> None:
        """Publish the workers, all at one address that serves, and a node for each."""
        for worker in workers:
            await self.cluster.put_node(node_of(worker), lease=self._lease)
            await self.cluster.put_worker(replace(worker, address=self._address), lease=self._lease)

    async def follow(self) -> None:
        """Start and stop replicas as the assignments say, for ever."""
        async for _ in self.cluster.changes():
            view = self.cluster.view
            for key, assignment in view.assignments.items():
                if key not in view.replicas and key[0] in view.workers:
                    await self._start(key[0], key[1], assignment.memory_bytes)
            for worker_id, model in view.replicas.keys() - view.assignments.keys():
                await self.cluster.delete_replica(worker_id, model)

    async def _start(self, worker_id: WorkerId, model: ModelName, memory_bytes: int) -> None:
        self._starts += 1
        jobs = (LONG_JOB,) if model in self.busy else ()
        record = ReplicaRecord(
            worker_id=worker_id,
            node_id=self.view.workers[worker_id].node_id,
            model=model,
            state=ReplicaState.READY,
            slots=16,
            running_jobs=len(jobs),
            pid=self._starts,
            memory_bytes=memory_bytes,
            idle_since_unix_s=0.0 if jobs else 1.0,
            timeline=StartTimeline(total_s=START_S, build_s=START_S, from_tier=Tier.SSD),
            jobs=jobs,
            seen_unix_s=time.time(),
            step_s=0.05,
            move_fixed_s=0.05,
            move_s_per_token=0.001,
        )
        await self.cluster.put_replica(record, lease=self._lease)

    async def want(self, *models: ModelRecord, since_unix_s: float) -> None:
        """Register models and say that a job waits for each."""
        for model in models:
            await self.cluster.put_model(model)
        for model in models:
            demand = DemandRecord(model.name, ROUTER, 1, since_unix_s)
            await self.cluster.put_demand(demand, lease=self._lease)

    async def note_arrivals(self, model: ModelName, *, times: int) -> None:
        """Say so many times that one more job for a model came and was done."""
        for _ in range(times):
            self._arrived += 1
            load = LoadRecord(model, ROUTER, time.time(), self._arrived, 0, 0, 0)
            await self.cluster.wait_seen(await self.cluster.put_load(load, lease=self._lease))

    async def serve(self, *models: ModelName) -> None:
        """Return when all are ready somewhere; then nothing waits for them any more."""
        await self.until(lambda view: all(is_ready(view, model) for model in models))
        for model in models:
            await self.cluster.delete_demand(model, ROUTER)

    async def clear(self) -> None:
        """Remove all models; return when nothing is assigned and nothing hosted."""
        for model in self.view.models:
            await self.cluster.delete_model(model)
        await self.until(lambda view: not view.assignments and not view.replicas)

    async def until(self, holds: Callable[[ClusterView], bool]) -> ClusterView:
        """Return the first view that satisfies `holds`."""
        return await self.cluster.wait_until(holds, timeout_s=WAIT_S)


def is_ready(view: ClusterView, model: ModelName) -> bool:
    """Whether a replica of the model serves."""
    return any(
        each.model == model and each.state is ReplicaState.READY for each in view.replicas.values()
    )


def played_worker(
    name: str, *, max_replicas: int = 4, memory_bytes: int = 1024 * MIB
) -> WorkerRecord:
    """A worker on a node of its own; its address comes with its registration."""
    return WorkerRecord(
        WorkerId(name), NodeId(f"node-of-{name}"), "", "cpu", memory_bytes, max_replicas
    )


def node_of(worker: WorkerRecord) -> NodeRecord:
    """The node of a played worker, which has every model that was registered for it."""
    return NodeRecord(worker.node_id, "127.0.0.1:1", "/nowhere", 2**33, 0, 1e8)


def played_model(name: str, *workers: WorkerRecord, size_bytes: int = 10 * MIB) -> ModelRecord:
    """A model that these workers' nodes have."""
    return ModelRecord(
        name=ModelName(name),
        digest="d" * 32,
        architecture="LlamaForCausalLM",
        parameters=size_bytes // 2,
        size_bytes=size_bytes,
        context_tokens=128,
        vocabulary_size=17,
        bos_token_id=None,
        eos_token_ids=(2,),
        source=f"/models/{name}",
        nodes=tuple(worker.node_id for worker in workers),
        dtype="bfloat16",
        kv_bytes_per_token=1024,
    )
