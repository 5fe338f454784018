"""`gearfall drain`: empty a node's workers before the machine goes away."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, console, print_json, print_table, seconds_text
from gearfall.core.errors import GearfallError, NotFound
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.pb import worker_pb2 as pb

LOST_EXIT = 3
FAILED_EXIT = 1


@dataclass(frozen=True, slots=True)
class Drained:
    """What came of one worker's drain."""

    worker_id: str
    reply: pb.DrainReply
    error: str = ""
    """Why it is not known what came of it; empty where it is."""


def drain(
    node: Annotated[str, typer.Argument(help="A node's name, or one worker's id.")],
    deadline: Annotated[
        float, typer.Option(min=0.0, help="Seconds after which running jobs are handed back.")
    ] = 30.0,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Move what runs on a node's workers elsewhere; they take nothing more.

    Exits with 0 when every job moved or finished, with 3 when some had to be handed back (their
    routers go on with them from their logs), with 1 when a worker did not answer.
    """
    with connect(server) as client:
        workers = [w for w in client.status().workers if node in {w.node_id, w.worker_id}]
    if not workers:
        raise NotFound(f"no live worker is on a node {node!r} or bears that id")
    drained = asyncio.run(drain_all(workers, deadline))
    if as_json:
        print_json([_to_json(each) for each in drained])
    else:
        _print(drained)
    raise typer.Exit(exit_code(drained))


async def drain_all(workers: Sequence[pb.WorkerStatus], deadline_s: float) -> list[Drained]:
    """Drain them at once, so that none is another's target; never raises for one of them."""
    return await asyncio.gather(*(_drain_one(each, deadline_s) for each in workers))


def exit_code(drained: Sequence[Drained]) -> int:
    """Return what the command exits with."""
    if any(each.error for each in drained):
        return FAILED_EXIT
    return LOST_EXIT if any(each.reply.lost_job_ids for each in drained) else 0


async def _drain_one(worker: pb.WorkerStatus, deadline_s: float) -> Drained:
    try:
        async with WorkerDoor(worker.address) as door:
            return Drained(worker.worker_id, await door.drain(deadline_s))
    except GearfallError as error:
        return Drained(worker.worker_id, pb.DrainReply(), error.message)


def _to_json(each: Drained) -> dict[str, object]:
    return {"worker_id": each.worker_id, "error": each.error, **as_dict(each.reply)}


def _print(drained: Sequence[Drained]) -> None:
    print_table(
        "drained",
        ("worker", "moved>", "finished>", "handed back>"),
        (
            (
                each.worker_id,
                each.reply.migrated_jobs,
                each.reply.finished_jobs,
                len(each.reply.lost_job_ids),
            )
            for each in drained
            if not each.error
        ),
    )
    for each in drained:
        if each.error:
            console.print(f"[red]{each.worker_id} was not drained:[/] {each.error}")
        for report in each.reply.migrations:
            console.print(_move_text(report))
        for job_id in each.reply.lost_job_ids:
            console.print(f"[yellow]job {job_id} handed back:[/] it starts again from its log")


def _move_text(report: pb.MigrationReport) -> str:
    if report.error:
        return f"[yellow]job {report.job_id} was not moved:[/] {report.error}"
    reply = report.reply
    return (
        f"job {report.job_id} moved to {report.target_worker_id} in "
        f"{seconds_text(reply.duration_s)}, paused for {seconds_text(reply.pause_s)}"
    )
