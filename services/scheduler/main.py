"""Wiring of the scheduler: settings, cluster state, election loop, gRPC server."""

import argparse
import asyncio
import gc
import uuid
from collections.abc import Sequence

from gearfall.core.records import SchedulerRecord
from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.net.metrics_server import add_metrics_setting, serving_metrics
from gearfall.infra.service_main import (
    ServiceParser,
    announce_ready,
    open_state,
    run_service,
)
from gearfall.infra.state.cluster import Cluster
from gearfall.pb.scheduler_pb2_grpc import add_SchedulerServicer_to_server
from gearfall.scheduling.policies import REAL_POLICIES, PlacementPolicy, decide_step
from gearfall.scheduling.prefetching.prefetch import PrefetchPolicy
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from services.scheduler.decision_log import DecisionLog
from services.scheduler.learned import WRITE_EVERY_S
from services.scheduler.loop import LEASE_TTL_S, SchedulerLoop
from services.scheduler.service import SchedulerService
from services.scheduler.servicer import SchedulerServicer


def main(argv: Sequence[str] | None = None) -> None:
    """Run a scheduler until it is told to stop."""
    settings = parse_settings(argv)
    run_service("scheduler", settings.log_level, lambda stop: serve(settings, stop))


def parse_settings(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read flags and environment."""
    parser = ServiceParser("scheduler")
    parser.add_setting(
        "--keep-alive",
        default=300.0,
        parse=float,
        meaning="seconds an idle model stays that no deployment names",
    )
    standing = SchedulerPolicy()
    parser.add_setting(
        "--min-residency",
        default=standing.min_residency_s,
        parse=float,
        meaning="seconds a replica stays at least, once it is ready",
    )
    parser.add_setting(
        "--residency-per-start",
        default=standing.residency_per_start,
        parse=float,
        meaning="and so many times as long as its start took",
    )
    parser.add_setting(
        "--policy",
        default=PlacementPolicy.OURS.value,
        parse=parse_policy,
        meaning=f"how models are placed: {', '.join(REAL_POLICIES)}",
    )
    parser.add_setting(
        "--policy-seed", default=0, parse=int, meaning="of what a policy leaves to chance"
    )
    parser.add_setting(
        "--lease-ttl",
        default=LEASE_TTL_S,
        parse=float,
        meaning="seconds after which another scheduler leads when this one does not answer",
    )
    parser.add_setting(
        "--learn-every",
        default=WRITE_EVERY_S,
        parse=float,
        meaning="least seconds between two writes of what was learned",
    )
    parser.add_setting(
        "--prefetch",
        default=True,
        parse=parse_switch,
        meaning="on or off: whether stores fetch ahead what is likely to be asked for",
    )
    add_metrics_setting(parser)
    return parser.parse_args(argv)


def parse_switch(text: str) -> bool:
    """Return whether it says on; ValueError unless it says on or off."""
    if text not in {"on", "off"}:
        raise ValueError(text)
    return text == "on"


def parse_policy(text: str) -> PlacementPolicy:
    """Return the policy of that name; ValueError for one that no real worker can follow."""
    if text not in REAL_POLICIES:
        raise ValueError(text)
    return PlacementPolicy(text)


async def serve(settings: argparse.Namespace, stop: asyncio.Event) -> None:
    """Serve until `stop` is set; then resign, so that another leads at once."""
    scheduler_id = f"scheduler-{uuid.uuid4().hex[:12]}"
    state = open_state(settings)
    cluster = Cluster(state)
    await cluster.start()
    policy = SchedulerPolicy(
        keep_alive_s=settings.keep_alive,
        min_residency_s=settings.min_residency,
        residency_per_start=settings.residency_per_start,
        prefetch=PrefetchPolicy() if settings.prefetch else None,
    )
    loop = SchedulerLoop(
        cluster,
        policy,
        decide=decide_step(settings.policy, seed=settings.policy_seed),
        lease_ttl_s=settings.lease_ttl,
        learn_every_s=settings.learn_every,
        # The fleet's index is there to stay: a full collection over it takes tens of milliseconds,
        # hundreds for 10,000 nodes, and nobody is decided for meanwhile.
        on_settled=gc.freeze,
        on_left=let_go,
    )
    log = DecisionLog()
    service = SchedulerService(cluster, loop, log, scheduler_id)
    server = await start_server(
        settings.listen,
        lambda s: add_SchedulerServicer_to_server(SchedulerServicer(service), s),
        ("gearfall.v1.Scheduler",),
    )
    address = settings.advertise or server.address
    following = asyncio.create_task(log.run(cluster), name="decision-log")
    loop.start(SchedulerRecord(scheduler_id, address))
    try:
        async with serving_metrics(settings.metrics, loop.render_metrics) as metrics:
            announce_ready("scheduler", address, metrics=metrics, scheduler_id=scheduler_id)
            await until_stopped(stop, loop)
    finally:
        await loop.stop()
        following.cancel()
        await asyncio.wait({following})
        await server.stop()
        await cluster.stop()
        await state.close()


def let_go() -> None:
    """Free what was there to stay and is there no more, before a next term has its own stay."""
    gc.unfreeze()
    gc.collect()


async def until_stopped(stop: asyncio.Event, loop: SchedulerLoop) -> None:
    """Return when `stop` is set; raise what ended the loop before, so that the process ends too."""
    waits = (asyncio.create_task(stop.wait()), asyncio.create_task(loop.wait_failed()))
    try:
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in waits:
            task.cancel()
