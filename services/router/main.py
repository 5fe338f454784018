"""Wiring of the router: settings, cluster state, queue, both doors, orderly stop."""

import argparse
import asyncio
import contextlib
import os
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc

from gearfall.core.gears.gear_shift import ShiftPolicy
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import ClusterState, JobQueue, Lease
from gearfall.core.records import RouterRecord
from gearfall.infra.history_log import count_held
from gearfall.infra.net.bearer import SECRET_VARIABLE, BearerInterceptor
from gearfall.infra.net.grpc_server import GrpcServer, start_server
from gearfall.infra.net.http_server import start_http_server
from gearfall.infra.queue.redis_queue import RedisQueue
from gearfall.infra.service_main import (
    ServiceParser,
    announce_ready,
    open_state,
    run_service,
)
from gearfall.infra.state.cluster import Cluster
from gearfall.pb.router_pb2_grpc import (
    add_RouterServicer_to_server,
    add_TokenSinkServicer_to_server,
)
from services.router.answer_cache import AnswerCache
from services.router.answer_desk import AnswerDesk
from services.router.background import Background
from services.router.cluster.catalogue import Catalogue
from services.router.cluster.cluster_status import ClusterStatus
from services.router.cluster.peers import Peers
from services.router.cluster.presence import Presence
from services.router.cluster.restoring import LASTING, restore_what_is_lost
from services.router.doors.rest import MAX_BODY_BYTES, RestDoor
from services.router.doors.servicer import RouterServicer
from services.router.doors.token_sink import GATHER_S, TokenSinkServicer
from services.router.gears.gear_board import GearBoard
from services.router.gears.quality_metrics import CacheMetrics, QualityMetrics
from services.router.gears.quality_watch import QualityWatch
from services.router.gears.shadow import Shadow
from services.router.jobs.demand import DemandBoard
from services.router.jobs.job_table import JobTable
from services.router.jobs.load_board import LoadBoard
from services.router.jobs.starts import is_ready
from services.router.metrics import RouterMetrics
from services.router.service import RouterLimits, RouterService
from services.router.text.tokenizing import FileSource, TokenizerCache


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """What one router needs to know, beside the state and queue it is given."""

    listen: str = "127.0.0.1:0"
    """host:port of the gRPC server."""
    rest_listen: str = "127.0.0.1:0"
    advertise: str = ""
    """host:port at which workers reach the gRPC server; empty: where it listens."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens REST's /v1 and gRPC's Router; none leaves both open."""
    cluster_secret: str = ""
    """What workers must send to push tokens; empty: anybody who reaches the port may."""
    max_body_bytes: int = MAX_BODY_BYTES
    limits: RouterLimits = field(default_factory=RouterLimits)
    gather_finished_s: float = GATHER_S
    """How long a worker's finished jobs wait to be told together."""
    shift_policy: ShiftPolicy = field(default_factory=ShiftPolicy)
    """How gears of plans follow the load."""


class Router:
    """A whole router over given ports. `start()`, then `stop()`; the ports stay the caller's."""

    def __init__(
        self,
        settings: RouterSettings,
        cluster: Cluster,
        state: ClusterState,
        queue: JobQueue,
        *,
        files: FileSource | None = None,
    ) -> None:
        """`files`: where tokenizers come from; None: the stores. `cluster` is started."""
        self.router_id = RouterId(f"router-{uuid.uuid4().hex[:12]}")
        self.rest_address = ""
        self.grpc_address = ""
        self._settings = settings
        self._cluster = cluster
        self._background = Background()
        metrics = RouterMetrics()
        self.demand = DemandBoard(
            cluster,
            self.router_id,
            lambda model: is_ready(model, cluster.view.replicas.values()),
        )
        self.load = LoadBoard(cluster, self.router_id)
        self.jobs = JobTable(
            queue,
            self.demand,
            self._background,
            load=self.load,
            on_epoch_bumped=lambda model: metrics.epochs_bumped.labels(model).inc(),
        )
        self.gears = GearBoard(
            cluster,
            self.router_id,
            lambda: self.demand.backlogs,
            clock=time.monotonic,
            policy=settings.shift_policy,
        )
        self.peers = Peers(lambda: cluster.view)
        quality = QualityMetrics(metrics.registry)
        self.quality = QualityWatch(
            cluster, self.gears.pin, self._background, quality, clock=time.time
        )
        self.shadow = Shadow(
            self._background,
            quality,
            hindrance=self._hindrance,
            on_compared=self.quality.compared,
        )
        self.cache = AnswerCache(cluster)
        self.service = RouterService(
            router_id=self.router_id,
            cluster=cluster,
            jobs=self.jobs,
            tokenizers=TokenizerCache(files or self.peers),
            metrics=metrics,
            gears=self.gears,
            desk=AnswerDesk(self.cache, self.quality, self.shadow, CacheMetrics(metrics.registry)),
            wishes=self.demand,
            draw_seed=lambda: secrets.randbits(63),
            draw_id=lambda: uuid.uuid4().hex,
            limits=settings.limits,
        )
        self.catalogue = Catalogue(cluster, queue, self.peers, is_model_used=self.jobs.is_used)
        self.status = ClusterStatus(
            router_id=self.router_id,
            view=lambda: cluster.view,
            state=state,
            queue=queue,
            peers=self.peers,
            waiting=lambda: self.demand.waiting,
            running_requests=lambda: self.service.running_requests,
            alarms=self.quality.alarms,
            costs=metrics.costs.totals,
        )
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Open both doors and publish the router. Raises Unavailable when a port can't be bound."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Give running requests their grace, leave the cluster, close both doors. Idempotent."""
        await self._stack.aclose()

    async def _end_links(self) -> None:
        self.jobs.end_links()

    async def _start(self) -> None:
        settings, stack = self._settings, self._stack
        stack.push_async_callback(self.peers.close)
        stack.push_async_callback(self._background.stop)
        server = await self._start_grpc()
        stack.push_async_callback(server.stop)
        self.grpc_address = settings.advertise or server.address
        self.service.address = self.grpc_address
        door = RestDoor(
            self.service,
            self.catalogue,
            self.status,
            api_keys=settings.api_keys,
            max_body_bytes=settings.max_body_bytes,
        )
        rest = await start_http_server(door.build_app(), settings.rest_listen)
        stack.push_async_callback(rest.stop)
        self.rest_address = rest.address
        # Push streams never end by themselves: without this the gRPC server waits its whole grace.
        stack.push_async_callback(self._end_links)
        record = RouterRecord(self.router_id, self.grpc_address, self.rest_address)
        presence = Presence(self._cluster, record, self._take_lease)
        stack.push_async_callback(presence.stop)
        # Before that: what runs in the grace needs this router's demand, load and votes, and
        # workers that know that it lives.
        stack.push_async_callback(self.service.stop)
        for work, name in (
            (presence.run(), "presence"),
            (self.demand.run(), "demand"),
            (self.load.run(), "load"),
            (self.gears.run(), "gears"),
            (self.quality.run(), "quality"),
            (self.cache.run(), "cache"),
            (self.service.run(), "service"),
            (restore_what_is_lost(self._cluster), "restoring"),
        ):
            self._background.spawn(work, name)

    def _hindrance(self, model: ModelName) -> str:
        return self.service.hindrance(model)

    def _take_lease(self, lease: Lease) -> None:
        self.demand.set_lease(lease)
        self.load.set_lease(lease)
        self.gears.set_lease(lease)

    async def _start_grpc(self) -> GrpcServer:
        def add_servicers(server: grpc.aio.Server) -> None:
            router = RouterServicer(
                self.service,
                self.catalogue,
                self.peers,
                self.status,
                self._settings.api_keys,
            )
            add_RouterServicer_to_server(router, server)
            sink = TokenSinkServicer(
                self.jobs, self.router_id, gather_s=self._settings.gather_finished_s
            )
            add_TokenSinkServicer_to_server(sink, server)

        settings = self._settings
        secrets_of_sink = (settings.cluster_secret,) if settings.cluster_secret else ()
        keys = {"gearfall.v1.Router": settings.api_keys, "gearfall.v1.TokenSink": secrets_of_sink}
        return await start_server(
            settings.listen, add_servicers, tuple(keys), interceptors=(BearerInterceptor(keys),)
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a router until it is told to stop."""
    flags = parse_settings(argv)
    run_service("router", flags.log_level, lambda stop: serve(flags, stop))


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read flags and environment."""
    parser = ServiceParser("router")
    parser.add_setting("--rest", default="127.0.0.1:0", meaning="host:port of the REST server")
    parser.add_setting(
        "--max-body-bytes", default=MAX_BODY_BYTES, parse=int, meaning="largest REST body taken"
    )
    parser.add_setting(
        "--max-choices",
        default=RouterLimits().max_choices,
        parse=int,
        meaning="answers generated or waiting at once; more are refused",
    )
    parser.add_setting(
        "--stop-grace",
        default=RouterLimits().stop_grace_s,
        parse=float,
        meaning="seconds that running requests get when the router is told to stop",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=_keys_from_environment(),
        help="opens both doors; repeatable; none leaves them open [GEARFALL_API_KEY, by commas]",
    )
    return parser.parse_args(argv)


async def serve(flags: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    settings = RouterSettings(
        listen=flags.listen,
        rest_listen=flags.rest,
        advertise=flags.advertise,
        api_keys=tuple(flags.api_key),
        cluster_secret=os.environ.get(SECRET_VARIABLE, ""),
        max_body_bytes=flags.max_body_bytes,
        limits=RouterLimits(max_choices=flags.max_choices, stop_grace_s=flags.stop_grace),
    )
    async with contextlib.AsyncExitStack() as stack:
        state = open_state(flags)
        stack.push_async_callback(state.close)
        queue = RedisQueue(flags.redis)
        stack.push_async_callback(queue.close)
        cluster = Cluster(state, lasting=LASTING)
        await cluster.start()
        stack.push_async_callback(cluster.stop)
        router = Router(settings, cluster, state, queue)
        await router.start()
        stack.push_async_callback(router.stop)
        count_held("jobs", lambda: len(router.jobs))
        announce_ready(
            "router", router.grpc_address, rest=router.rest_address, router_id=router.router_id
        )
        await stop.wait()


def _keys_from_environment() -> list[str]:
    return [key for key in os.environ.get("GEARFALL_API_KEY", "").split(",") if key]
