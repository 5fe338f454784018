"""Replies on their way to a worker: finished jobs wait for each other, nothing else does."""

from gearfall.core.ids import Epoch, JobId
from services.router.doors.token_sink import Outbox
from services.router.jobs.running_job import Finished, Stop

LONG_S, SHORT_S = 3600.0, 0.001


def finished(*names: str) -> list[Finished]:
    return [Finished(JobId(name), Epoch(1)) for name in names]


async def test_jobs_that_finished_are_told_together():
    outbox = Outbox(SHORT_S)
    for reply in finished("a", "b", "c"):
        outbox.send(reply)
    message = await anext(aiter(outbox))
    assert [(job.job_id, job.epoch) for job in message.finished.jobs] == [
        ("a", 1),
        ("b", 1),
        ("c", 1),
    ]
    outbox.send(*finished("d"))
    assert [job.job_id for job in (await anext(aiter(outbox))).finished.jobs] == ["d"]


async def test_no_other_reply_waits_for_them():
    outbox = Outbox(LONG_S)
    outbox.send(*finished("a"))
    outbox.send(Stop(JobId("b"), Epoch(2), "fenced"))
    assert (await anext(aiter(outbox))).stop.job_id == "b"


async def test_an_end_tells_what_waits_first():
    outbox = Outbox(LONG_S)
    for reply in finished("a", "b"):
        outbox.send(reply)
    outbox.end()
    (message,) = [each async for each in outbox]
    assert [job.job_id for job in message.finished.jobs] == ["a", "b"]


async def test_nothing_is_told_where_nothing_finished():
    outbox = Outbox(SHORT_S)
    outbox.end()
    assert [each async for each in outbox] == []
