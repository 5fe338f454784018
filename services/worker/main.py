"""Wiring of the worker: settings, zygote, cluster state, queue, host, gRPC server."""

import argparse
import asyncio
import os
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.core.ids import ModelName, NodeId, WorkerId
from gearfall.core.records import WorkerRecord
from gearfall.infra.history_log import count_held
from gearfall.infra.memory.pool_lease import take_lease
from gearfall.infra.net.bearer import SECRET_VARIABLE
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.net.metrics_server import add_metrics_setting, serving_metrics
from gearfall.infra.queue.redis_queue import RedisQueue
from gearfall.infra.service_main import (
    ServiceParser,
    announce_ready,
    open_state,
    run_service,
)
from gearfall.infra.state.cluster import Cluster
from gearfall.pb.worker_pb2_grpc import add_WorkerServicer_to_server
from services.worker.drain_door import drain_route
from services.worker.engine_link.messages import EngineKind
from services.worker.gear_rules import GearRules
from services.worker.host import WorkerHost
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.push_stream import PushListener, PushStream
from services.worker.jobs.settlement import Settlement
from services.worker.metrics import WorkerMetrics
from services.worker.migration.call import Moved
from services.worker.migration.desk import MigrationDesk
from services.worker.migration.evacuation import Evacuation
from services.worker.migration.terms import Terms
from services.worker.ports import EngineSpawner
from services.worker.processes.zygote_client import Zygote
from services.worker.registration import Registration
from services.worker.replicas.publisher import ReplicaPublisher
from services.worker.replicas.replica import Replica, ReplicaPorts
from services.worker.replicas.replica_start import ReplicaSettings, StartPorts
from services.worker.service import WorkerService
from services.worker.servicer import WorkerServicer
from services.worker.store_client import GrpcStoreClient

STOP_DRAIN_S = 5.0
"""How long running jobs may finish after SIGTERM before they are handed back."""


@dataclass(frozen=True, slots=True)
class StartedWorker:
    """A worker that serves."""

    record: WorkerRecord
    service: WorkerService


def main(argv: Sequence[str] | None = None) -> None:
    """Run a worker until it is told to stop."""
    settings = parse_settings(argv)
    run_service("worker", settings.log_level, lambda stop: serve(settings, stop))


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read flags and environment."""
    parser = ServiceParser("worker")
    parser.add_setting("--node-id", default="node-1", meaning="node whose store it uses")
    parser.add_setting("--device", default="cpu", meaning="cpu or cuda:<index>")
    parser.add_setting(
        "--memory-bytes",
        default=4 << 30,
        parse=int,
        meaning="capacity for weights, KV cache and processes of all replicas",
    )
    parser.add_setting("--max-replicas", default=8, parse=int, meaning="most models at once")
    parser.add_setting("--slots", default=16, parse=int, meaning="most jobs at once per replica")
    parser.add_setting("--threads", default=0, parse=int, meaning="per engine; 0: half the cores")
    parser.add_setting(
        "--engine",
        default=EngineKind.GEARFALL.value,
        parse=EngineKind,
        meaning="gearfall or vllm (needs the extra of that name)",
    )
    parser.add_setting(
        "--arithmetic",
        default=Arithmetic.BF16.value,
        parse=Arithmetic,
        meaning="how a CPU multiplies with bfloat16 weights: bf16, which rounds activations as "
        "transformers does, or exact, which takes up to twice as long; all workers of a model "
        "should have the same",
    )
    parser.add_setting(
        "--kv-bytes-per-s-limit",
        default=0.0,
        parse=float,
        meaning="keys and values of a job that moves away leave no faster; 0: as fast as they can",
    )
    add_metrics_setting(parser)
    parser.add_argument("--label", action="append", default=[], help="k=v, repeatable")
    return parser.parse_args(argv)


async def serve(settings: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set; then drain briefly and deregister."""
    async with AsyncExitStack() as stack:
        # The warm parent is started before anything touches gRPC in this process.
        zygote = Zygote()
        await zygote.start()
        stack.push_async_callback(zygote.stop)
        metrics = WorkerMetrics()
        started = await start_worker(settings, zygote, stack, metrics)
        record = started.record
        door = drain_route(started.service, os.environ.get(SECRET_VARIABLE, ""))
        metrics_address = await stack.enter_async_context(
            serving_metrics(settings.metrics, metrics.render, [door])
        )
        announce_ready(
            "worker", record.address, metrics=metrics_address, worker_id=record.worker_id
        )
        await stop.wait()


async def start_worker(
    settings: argparse.Namespace,
    spawner: EngineSpawner,
    stack: AsyncExitStack,
    metrics: WorkerMetrics | None = None,
) -> StartedWorker:
    """Build and start everything over `spawner`; `stack` stops it in reverse order."""
    metrics = metrics or WorkerMetrics()
    worker_id = WorkerId(f"worker-{uuid.uuid4().hex[:12]}")
    node_id = NodeId(settings.node_id)
    state = open_state(settings)
    stack.push_async_callback(state.close)
    cluster = Cluster(state)
    await cluster.start()
    stack.push_async_callback(cluster.stop)
    queue = RedisQueue(settings.redis)
    stack.push_async_callback(queue.close)
    settlement = Settlement(queue)
    settlement.start()
    stack.push_async_callback(settlement.stop)

    def open_stream(address: str, listener: PushListener) -> PushStream:
        secret = os.environ.get(SECRET_VARIABLE, "")
        return PushStream(address, worker_id, node_id, listener, secret=secret)

    board = JobBoard(
        settlement,
        open_stream,
        lambda router: router in cluster.view.routers,
        on_lost=metrics.count_lost,
    )
    stack.push_async_callback(board.stop)
    count_held("claims", lambda: board.open_claims)
    publisher = ReplicaPublisher(cluster, worker_id)
    publisher.start()
    stack.push_async_callback(publisher.stop)
    store = _store_client(cluster, node_id)
    stack.push_async_callback(store.close)
    await store.connect()
    ports = ReplicaPorts(
        start=StartPorts(store, take_lease, spawner),
        queue=queue,
        board=board,
        publisher=publisher,
        alive_workers=lambda: frozenset(cluster.view.workers),
        metrics=metrics,
        evacuate=lambda model: Evacuation(cluster, desk, worker_id, model),
        move_cost=lambda model: desk.move_cost(model),  # noqa: PLW0108 - made further down
        claim_rule=GearRules(cluster, worker_id).rule_for,
    )
    shared = ReplicaSettings(
        worker_id,
        node_id,
        settings.device,
        settings.slots,
        _threads(settings.threads),
        engine=settings.engine,
        arithmetic=settings.arithmetic,
    )
    host = WorkerHost(
        cluster,
        Registration(cluster, publisher.use_lease, before=publisher.write_under),
        lambda assignment, model: Replica(assignment, model, shared, ports),
    )
    metrics.follow(host.replicas)
    service = WorkerService(host)

    def note_migration(model: ModelName, moved: Moved | None) -> None:
        metrics.count_migration(model, moved)
        host.note_moved(model)

    desk = MigrationDesk(
        board,
        host,
        worker_id,
        host=settings.listen.rpartition(":")[0],
        terms=Terms(kv_bytes_per_s=settings.kv_bytes_per_s_limit),
        on_ended=note_migration,
    )
    stack.callback(desk.close)

    def add_servicers(server: grpc.aio.Server) -> None:
        add_WorkerServicer_to_server(WorkerServicer(service, desk), server)
        desk.stream_door.add_to(server)

    server = await start_server(settings.listen, add_servicers, ("gearfall.v1.Worker",))
    stack.push_async_callback(server.stop)
    await host.start(
        WorkerRecord(
            worker_id=worker_id,
            node_id=node_id,
            address=settings.advertise or server.address,
            device=settings.device,
            memory_bytes=settings.memory_bytes,
            max_replicas=settings.max_replicas,
            labels=_labels(settings.label),
            slots=settings.slots,
        )
    )
    stack.push_async_callback(host.stop, STOP_DRAIN_S)
    return StartedWorker(host.record, service)


def _store_client(cluster: Cluster, node_id: NodeId) -> GrpcStoreClient:
    def find_address() -> str | None:
        node = cluster.view.nodes.get(node_id)
        return node.address if node else None

    return GrpcStoreClient(find_address)


def _threads(asked: int) -> int:
    return asked if asked > 0 else max(1, (os.cpu_count() or 2) // 2)


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"--label must be k=v, not {pair!r}", param="label")
        labels[key] = value
    return labels
