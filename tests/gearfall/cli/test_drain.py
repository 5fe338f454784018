"""`gearfall drain` against worker doors that answer over real gRPC."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest

from gearfall.cli.drain import Drained, drain_all, exit_code
from gearfall.core.errors import Unavailable
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server


class ScriptedWorker(WorkerServicer):
    """Answers a drain as it was told to."""

    def __init__(self, reply: pb.DrainReply | None) -> None:
        self.reply = reply
        self.deadlines_s: list[float] = []

    async def Drain(self, request, context):
        self.deadlines_s.append(request.deadline_s)
        if self.reply is None:
            raise Unavailable("on its way out")
        return self.reply

    async def GetStatus(self, request, context):
        raise AssertionError(request)

    async def MigrateJob(self, request, context):
        raise AssertionError(request)

    def ReceiveMigration(self, request_iterator, context):
        raise AssertionError(request_iterator)


@asynccontextmanager
async def served(*workers: ScriptedWorker) -> AsyncIterator[list[pb.WorkerStatus]]:
    async with AsyncExitStack() as stack:
        statuses = []
        for number, worker in enumerate(workers):
            server = await start_server(
                "127.0.0.1:0",
                partial(add_WorkerServicer_to_server, worker),
                ("gearfall.v1.Worker",),
            )
            stack.push_async_callback(server.stop, 0)
            statuses.append(pb.WorkerStatus(worker_id=f"w{number}", address=server.address))
        yield statuses


ALL_MOVED = pb.DrainReply(migrated_jobs=2, finished_jobs=1)
ONE_LOST = pb.DrainReply(migrated_jobs=1, lost_job_ids=["j"])


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([ALL_MOVED, ALL_MOVED], 0),
        ([ALL_MOVED, ONE_LOST], 3),
        ([None, ONE_LOST], 1),
        ([pb.DrainReply()], 0),
    ],
)
async def test_the_exit_code_tells_what_became_of_the_jobs(replies, expected):
    workers = [ScriptedWorker(reply) for reply in replies]
    async with served(*workers) as statuses:
        drained = await drain_all(statuses, 2.5)
    assert exit_code(drained) == expected
    assert [each.worker_id for each in drained] == [f"w{n}" for n in range(len(replies))]
    assert [each.reply for each in drained] == [reply or pb.DrainReply() for reply in replies]
    assert all(worker.deadlines_s == [2.5] for worker in workers)
    assert [each.error != "" for each in drained] == [reply is None for reply in replies]


async def test_a_worker_that_is_gone_is_an_error_of_its_own():
    async with served(ScriptedWorker(ALL_MOVED)) as [there]:
        gone = pb.WorkerStatus(worker_id="gone", address="127.0.0.1:1")
        drained = await drain_all([there, gone], 1.0)
    assert drained[0] == Drained("w0", ALL_MOVED)
    assert drained[1].error
    assert exit_code(drained) == 1
