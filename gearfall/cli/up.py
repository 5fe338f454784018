"""`gearfall up`: a whole cluster on this machine, until Ctrl-C."""

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson, Home, default_home, parse_address, run_dir
from gearfall.cli.demo import prepare
from gearfall.cli.deploy import deployment_of_plan
from gearfall.cli.render import console, print_json
from gearfall.client import AsyncClient
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.scheduling.policies import REAL_POLICIES, PlacementPolicy

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def up(
    home: Home = None,
    rest: Annotated[str, typer.Option(help="host:port of the REST door.")] = "127.0.0.1:8080",
    grpc: Annotated[str, typer.Option(help="host:port of the gRPC door.")] = "127.0.0.1:50051",
    etcd: Annotated[str, typer.Option(help="etcd URL; default: start one.")] = "",
    redis: Annotated[str, typer.Option(help="Redis URL; default: start one.")] = "",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes: a store and workers each.")] = 1,
    workers_per_node: Annotated[int, typer.Option(min=1)] = 1,
    dram: Annotated[str, typer.Option(help="DRAM pool of each store, as 4G.")] = "4G",
    memory: Annotated[str, typer.Option(help="Memory of each worker, as 4G.")] = "4G",
    max_replicas: Annotated[int, typer.Option(min=1, help="Models a worker hosts at once.")] = 8,
    slots: Annotated[int, typer.Option(min=1, help="Jobs a replica runs at once.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="Threads of an engine.")] = 1,
    keep_alive: Annotated[
        float, typer.Option(min=0, help="Idle seconds before a model without a deployment stops.")
    ] = 300.0,
    schedulers: Annotated[
        int, typer.Option(min=1, help="One leads; the others take over when it dies.")
    ] = 1,
    policy: Annotated[
        PlacementPolicy,
        typer.Option(help="How models are placed; others than ours are there to be compared with."),
    ] = PlacementPolicy.OURS,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Accept only these bearer tokens; repeatable.")
    ] = None,
    with_demo: Annotated[
        bool, typer.Option("--demo", help="Register and deploy the demo family.")
    ] = False,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Gear plan to deploy, of models that are registered; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start etcd, Redis, stores, workers, scheduler and router here, until Ctrl-C.

    With --etcd and --redis the cluster uses those servers; else binaries on PATH, else those that
    the extra `local` installed.
    """
    where = default_home() if home is None else home.absolute()
    settings = LocalClusterSettings(
        runtime_dir=run_dir(where),
        data_dir=where / "data",
        rest_listen=parse_address(rest, param="--rest"),
        grpc_listen=parse_address(grpc, param="--grpc"),
        etcd_url=etcd,
        redis_url=redis,
        nodes=nodes,
        workers_per_node=workers_per_node,
        dram_bytes=parse_bytes(dram, param="--dram"),
        memory_bytes=parse_bytes(memory, param="--memory"),
        max_replicas=max_replicas,
        slots=slots,
        threads=threads,
        keep_alive_s=keep_alive,
        schedulers=schedulers,
        policy=real_policy(policy),
        api_keys=tuple(api_key or ()),
    )
    contents = [path.read_bytes() for path in plan or ()]
    plans = [(content, parse_plan(content)) for content in contents]
    asyncio.run(_run(settings, plans, with_demo=with_demo, as_json=as_json))


def real_policy(policy: PlacementPolicy) -> str:
    """Return the name for a real scheduler; InvalidRequest where there is none."""
    if policy.value not in REAL_POLICIES:
        message = f"{policy.value} is there for `gearfall simulate` only"
        raise InvalidRequest(message, param="--policy")
    return policy.value


async def _run(
    settings: LocalClusterSettings,
    plans: Sequence[tuple[bytes, GearPlan]],
    *,
    with_demo: bool,
    as_json: bool,
) -> None:
    cluster = LocalCluster(settings)
    work = asyncio.create_task(_serve(cluster, plans, with_demo=with_demo, as_json=as_json))
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, work.cancel)  # a start that takes long ends as well
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await work
    finally:
        await cluster.stop()


async def _serve(
    cluster: LocalCluster,
    plans: Sequence[tuple[bytes, GearPlan]],
    *,
    with_demo: bool,
    as_json: bool,
) -> None:
    """Start everything, say so, and never return."""
    await cluster.start()
    key = next(iter(cluster.settings.api_keys), "")
    if with_demo:
        await asyncio.to_thread(prepare, cluster.grpc_address, quiet=as_json, api_key=key)
    async with AsyncClient(cluster.grpc_address, api_key=key) as client:
        for content, plan in plans:
            await client.deploy(deployment_of_plan(plan), gear_plan=content.decode())
    if as_json:
        print_json({"rest": cluster.rest_address, "grpc": cluster.grpc_address})
    else:
        console.print(
            f"gearfall is up: REST http://{cluster.rest_address}/v1, "
            f"gRPC {cluster.grpc_address}, logs in {cluster.settings.runtime_dir}. "
            "Ctrl-C stops it."
        )
    await asyncio.Event().wait()


def parse_bytes(text: str, *, param: str) -> int:
    """Parse 4G, 512M or plain bytes (binary units); raise InvalidRequest for anything else."""
    number, unit = text.strip().upper().removesuffix("IB").removesuffix("B"), ""
    if number and number[-1] in _UNITS:
        number, unit = number[:-1], number[-1]
    if not number.isdecimal() or int(number) == 0:
        raise InvalidRequest(f"{param} must be a size as 512M or 4G, not {text!r}", param=param)
    return int(number) * _UNITS[unit]
