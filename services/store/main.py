"""Wires one store: settings, cluster state, the service, its gRPC server and its end."""

import argparse
import asyncio
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import NodeId, parse_name
from gearfall.infra.history_log import count_held
from gearfall.infra.memory.native import read_chunks
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.net.metrics_server import add_metrics_setting, serving_metrics
from gearfall.infra.service_main import (
    ServiceParser,
    announce_ready,
    open_state,
    run_service,
)
from gearfall.infra.state.cluster import Cluster
from gearfall.pb.store_pb2_grpc import add_StoreServicer_to_server
from services.store.lone_node import check_is_free
from services.store.service import StoreService
from services.store.servicer import StoreServicer
from services.store.settings import StoreSettings
from services.store.tiers.spare_memory import SPARE_BYTES
from services.store.tiers.throttle import PacedRead

_DEFAULT_DATA_DIR = "~/.local/share/gearfall/store"
_DEFAULT_DRAM_BYTES = 2 * 2**30
SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> None:
    """Run a store until SIGTERM or SIGINT."""
    flags = parse_flags(argv)
    # Checksums take the interpreter lock for a moment each; a thread that never pauses makes each
    # wait for this long, and Python's 5 ms would double the time of a load.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    run_service("store", flags.log_level, lambda stop: serve(flags, stop))


def parse_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read flags and environment."""
    parser = ServiceParser("store")
    parser.add_setting(
        "--node-id",
        default=socket.gethostname().lower(),
        meaning="name of this node in the cluster",
        parse=_node_id,
    )
    parser.add_setting(
        "--data-dir",
        default=_DEFAULT_DATA_DIR,
        meaning="directory of the SSD tier",
        parse=_directory,
    )
    parser.add_setting(
        "--attach-dir",
        default="",
        meaning="private directory of the attach socket; DATA_DIR/attach if empty",
    )
    parser.add_setting(
        "--ssd-bytes",
        default=0,
        meaning="most bytes of models on the SSD tier; 0 for what its file system has",
        parse=_not_negative,
    )
    parser.add_setting(
        "--dram-bytes",
        default=_DEFAULT_DRAM_BYTES,
        meaning="capacity of the DRAM pool",
        parse=_positive,
    )
    add_metrics_setting(parser)
    parser.add_setting(
        "--ssd-bytes-per-s-limit",
        default=0,
        meaning="read the SSD tier no faster than this, as if its disk were slower; 0: as it is",
        parse=_not_negative,
    )
    parser.add_setting(
        "--spare-bytes",
        default=SPARE_BYTES,
        meaning="most memory of the pool's free room that is kept ready for the next load; 0: none",
        parse=_not_negative,
    )
    return parser.parse_args(argv)


async def serve(flags: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set or a part of the store fails."""
    attach_dir = _directory(flags.attach_dir) if flags.attach_dir else flags.data_dir / "attach"
    settings = StoreSettings(
        flags.node_id,
        flags.data_dir,
        attach_dir,
        flags.dram_bytes,
        ssd_bytes=flags.ssd_bytes,
        spare_bytes=flags.spare_bytes,
        bulk_host=flags.listen.rpartition(":")[0].strip("[]"),
    )
    async with AsyncExitStack() as stack:
        state = open_state(flags)
        stack.push_async_callback(state.close)
        cluster = Cluster(state)
        await cluster.start()
        stack.push_async_callback(cluster.stop)
        limit = flags.ssd_bytes_per_s_limit
        read = PacedRead(read_chunks, limit) if limit else read_chunks
        await check_is_free(cluster.view, flags.node_id)
        service = StoreService(settings, cluster, read=read)
        stack.push_async_callback(service.stop)
        await service.open()
        server = await start_server(
            flags.listen,
            lambda grpc_server: add_StoreServicer_to_server(StoreServicer(service), grpc_server),
            ("gearfall.v1.Store",),
        )
        stack.push_async_callback(server.stop)
        address = flags.advertise or server.address
        await service.start(address)
        metrics = await stack.enter_async_context(
            serving_metrics(flags.metrics, service.render_metrics)
        )
        announce_ready(
            "store",
            address,
            metrics=metrics,
            node_id=settings.node_id,
            attach_socket=str(service.attach.path),
        )
        count_held("leases", lambda: service.pool.leases)
        await _until_stopped(service, stop)
        left = service.pool.leases  # before the pool is closed under whoever has them
        count_held("leases", lambda: left)


async def _until_stopped(service: StoreService, stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(service.wait_failed())
    await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if failed.done():
        await failed
    failed.cancel()


def _node_id(text: str) -> NodeId:
    try:
        return NodeId(parse_name(text, param="node-id"))
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _directory(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError(text)
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value
