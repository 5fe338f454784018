"""`gearfall migrate`: move a running request to another worker."""

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, console, print_json, seconds_text
from gearfall.core.errors import NotFound
from gearfall.core.ids import JobId
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.pb import common_pb2
from gearfall.pb import worker_pb2 as pb


class Way(Enum):
    """How what the other worker needs gets there."""

    AUTO = "auto"
    TOKENS = "tokens"
    KV = "kv"


_PATHS = {
    Way.AUTO: pb.MIGRATION_PATH_UNSPECIFIED,
    Way.TOKENS: pb.MIGRATION_PATH_TOKENS,
    Way.KV: pb.MIGRATION_PATH_KV,
}


def migrate(
    request: Annotated[str, typer.Argument(help="A running request's id, or a job's.")],
    to: Annotated[str, typer.Option(help="Id of the worker; by default the freest one.")] = "",
    by: Annotated[Way, typer.Option(help="What to send; auto: what is faster.")] = Way.AUTO,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Move what runs for a request to another worker; its client does not notice."""
    with connect(server) as client:
        workers = tuple(client.status().workers)
    source, job = find_job(workers, request)
    target = find_target(workers, source, job.model, to)
    reply = asyncio.run(_move(source.address, job.job_id, target.address, by))
    if as_json:
        print_json({"job_id": job.job_id, "target": target.worker_id, **as_dict(reply)})
        return
    way = "keys and values" if reply.path != pb.MIGRATION_PATH_TOKENS else "tokens"
    console.print(
        f"job {job.job_id} moved to {target.worker_id} by its {way} in "
        f"{seconds_text(reply.duration_s)}, paused for {seconds_text(reply.pause_s)}"
    )


def find_job(
    workers: Sequence[pb.WorkerStatus], request: str
) -> tuple[pb.WorkerStatus, pb.RunningJob]:
    """Return the job of a request and the worker that owns it. Raises NotFound."""
    for worker in workers:
        for job in worker.jobs:
            if request in {job.job_id, job.request_id}:
                return worker, job
    raise NotFound(f"no worker runs a job of {request!r} now")


def find_target(
    workers: Sequence[pb.WorkerStatus], source: pb.WorkerStatus, model: str, worker_id: str
) -> pb.WorkerStatus:
    """Return the worker asked for, or the freest other one that serves the model.

    Raises NotFound when there is none.
    """
    free = {
        worker.worker_id: (replica.slots - replica.running_jobs, worker)
        for worker in workers
        for replica in worker.replicas
        if replica.model == model
        and replica.state == common_pb2.REPLICA_STATE_READY
        and worker.worker_id != source.worker_id
    }
    if worker_id and worker_id not in free:
        raise NotFound(f"worker {worker_id!r} does not serve {model}, or the job is there")
    if not free:
        raise NotFound(f"no other worker serves {model}")
    best = worker_id or max(free, key=lambda name: (free[name][0], name))
    return free[best][1]


async def _move(source: str, job_id: str, target: str, by: Way) -> pb.MigrateJobReply:
    async with WorkerDoor(source) as door:
        return await door.move(JobId(job_id), target, _PATHS[by])
