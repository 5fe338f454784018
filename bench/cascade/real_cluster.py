"""The cluster of `bench.cascade real`: nodes of one worker, each pinned to a core of its own.

A worker's engines share its core, as models on one accelerator do; everything else, the load
included, has the cores that are left. While systems are measured, every model has a ready replica
on every worker: none of them waits for a start.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.cascade.companions import LAYERS, WIDTH, write_companion
from bench.cascade.real_prediction import node_name
from bench.measuring.cpu_time import cpu_seconds
from gearfall.cli.deploy import deployment_of_plan
from gearfall.client import AsyncClient
from gearfall.core.errors import Unavailable
from gearfall.core.gears.gear_plan import GearPlan, plan_text
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo.catalogue import checkpoint_paths
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings, service_commands
from gearfall.infra.local.supervised_process import ProcessSpec
from gearfall.pb import common_pb2
from services.worker.engine.step_log import STEP_LOG_VARIABLE

WORKERS = 2
SLOTS = 16
_READY_S = 300.0
_LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Companions:
    """How large the models are, in those of their originals, and what a node of theirs needs."""

    width: int
    layers: int
    dram_bytes: int
    memory_bytes: int


COMPANIONS = {
    "usual": Companions(WIDTH, LAYERS, 2**30, 3 * 2**30),
    "large": Companions(16, 1, 2 * 2**30, 5 * 2**30),
}
"""A token of a large one takes 2.7 times as much arithmetic: up to 680 million parameters."""


@dataclass(frozen=True, slots=True)
class RealCluster:
    """A running cluster with the companions registered."""

    client: AsyncClient
    address: str
    """Of the gRPC door."""
    models: tuple[ModelName, ...]
    """Smallest first."""
    worker_pids: Mapping[str, int]
    """By node."""
    pids: Mapping[str, int]
    """Of every process but engines: workers by node, the others by name."""
    step_logs: Path
    """Where engines log their steps."""

    async def engines(self) -> Mapping[int, tuple[str, str]]:
        """Return (node, model) of every engine that is ready, by its process id."""
        return {
            replica.pid: (worker.node_id, replica.model)
            for worker in (await self.client.status()).workers
            for replica in worker.replicas
            if replica.state == common_pb2.REPLICA_STATE_READY
        }

    def device_seconds(self) -> float:
        """Return the CPU time of all workers and their engines so far."""
        return sum(cpu_seconds(self.worker_pids).values())


@contextlib.asynccontextmanager
async def running_cluster(scratch: Path, sizes: Companions) -> AsyncIterator[RealCluster]:
    """Start it; stop it and give the cores back at the end."""
    settings = LocalClusterSettings(
        runtime_dir=scratch / "run",
        data_dir=scratch / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        nodes=WORKERS,
        dram_bytes=sizes.dram_bytes,
        memory_bytes=sizes.memory_bytes,
        max_replicas=4,
        slots=SLOTS,
        log_level="WARNING",
    )
    models = tuple(ModelName(name) for name in checkpoint_paths())
    step_logs = scratch / "steps"
    step_logs.mkdir()
    with _cores() as workers:
        cluster = LocalCluster(settings, commands=lambda known: _placed(known, workers, step_logs))
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(cluster.stop)
            await cluster.start()
            client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
            for name, original in checkpoint_paths().items():
                source = scratch / "companions" / name
                await asyncio.to_thread(
                    write_companion, original, source, width=sizes.width, layers=sizes.layers
                )
                async for _ in client.register_model(name, str(source)):
                    pass
            pids, worker_pids = _pids(cluster)
            yield RealCluster(client, cluster.grpc_address, models, worker_pids, pids, step_logs)


@contextlib.contextmanager
def _cores() -> Iterator[Sequence[int]]:
    """Take the last cores for workers and leave the others to this process and its children."""
    whole = os.sched_getaffinity(0)
    cores = sorted(whole)
    if len(cores) < WORKERS + 2:
        raise Unavailable(f"{len(cores)} cores; {WORKERS + 2} are needed, one for each worker")
    os.sched_setaffinity(0, cores[:-WORKERS])
    try:
        yield cores[-WORKERS:]
    finally:
        os.sched_setaffinity(0, whole)


def _pids(cluster: LocalCluster) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return the process ids of all, and those of the workers, which are named by their nodes."""
    workers: dict[str, int] = {}
    others: dict[str, int] = {}
    for process in cluster.processes:
        assert process.pid is not None, f"{process.spec.name} has ended"
        if process.spec.service == "worker":
            workers[node_name(len(workers))] = process.pid
        else:
            others[process.spec.name] = process.pid
    assert len(workers) == WORKERS
    return {**workers, **others}, workers


def _placed(
    settings: LocalClusterSettings, cores: Sequence[int], step_logs: Path
) -> Sequence[Sequence[ProcessSpec]]:
    """Pin each worker to its core and have its engines log their steps."""
    stores, workers, schedulers, routers = service_commands(settings)
    pinned = [
        replace(
            spec,
            argv=("taskset", "--cpu-list", str(core), *spec.argv),
            environment={**spec.environment, STEP_LOG_VARIABLE: str(step_logs)},
        )
        for spec, core in zip(workers, cores, strict=True)
    ]
    return (stores, pinned, schedulers, routers)


async def keep_replicas(client: AsyncClient, models: Sequence[ModelName], replicas: int) -> None:
    """Deploy each model by itself, with so many replicas; return when just those are ready."""
    for model in models:
        record = DeploymentRecord(
            DeploymentName(f"keep-{model}"),
            (Stage(model),),
            min_replicas=replicas,
            max_replicas=replicas,
            keep_alive_s=1.0,
            spread=True,
        )
        await client.deploy(record)
    async with asyncio.timeout(_READY_S):
        await _all_ready(client, models, replicas)


async def _all_ready(client: AsyncClient, models: Sequence[ModelName], replicas: int) -> None:
    while True:
        found = [model for _, model in await _replicas(client)]
        if all(found.count(model) == replicas for model in models):
            return
        await asyncio.sleep(_LOOK_AGAIN_S)


@contextlib.asynccontextmanager
async def deployed(client: AsyncClient, plan: GearPlan) -> AsyncIterator[None]:
    """Have one plan in force, and no other: several plans for one model share its workers."""
    await client.deploy(deployment_of_plan(plan), gear_plan=plan_text(plan))
    try:
        yield
    finally:
        await client.remove_deployment(plan.name)


async def _replicas(client: AsyncClient) -> set[tuple[str, str]]:
    """Return (worker, model) of every ready replica."""
    return {
        (worker.worker_id, replica.model)
        for worker in (await client.status()).workers
        for replica in worker.replicas
        if replica.state == common_pb2.REPLICA_STATE_READY
    }
