"""What a replica's record says of its jobs."""

import asyncio

import pytest

from gearfall.core.generation.job import Priority
from gearfall.core.ports import QueuedJob
from gearfall.core.records import RunningJob
from services.worker.engine_link.messages import StepDone
from services.worker.jobs.claims import ClaimBook, ClaimEvent
from services.worker.replicas.workload import (
    KV_INTERVAL_S,
    JobNews,
    KvShare,
    RecentSteps,
    running_jobs,
)
from tests.services.worker.fakes import job, run_of


def test_a_claim_is_told_with_the_tokens_that_it_has_so_far():
    book = ClaimBook()
    book.add(QueuedJob("1-0", job("a", generated=(4, 4), priority=Priority.BATCH), 1))
    (claim,) = book
    book.apply(claim.key, ClaimEvent.CONNECTED)
    book.take(run_of(claim.job, 2, tokens=(7, 7, 7)))
    assert running_jobs(book) == (RunningJob(claim.job.job_id, 3, 5, 8, Priority.BATCH),)


def step(seconds: float, tokens=(7,), earlier=()) -> StepDone:
    return StepDone((run_of(job(), 0, tokens=tokens),), 1, 0, seconds, earlier_step_s=earlier)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), 0.0),
        ((step(0.01), step(0.02), step(0.9)), 0.02),
        ((step(0.01), step(0.5, tokens=()), step(0.0)), 0.01),
        ((*(step(0.5) for _ in range(50)), *(step(0.01) for _ in range(33))), 0.01),
        ((step(0.0, earlier=(0.01, 0.02, 0.9)),), 0.02),
    ],
)
def test_a_decode_step_takes_what_the_newest_ones_took(steps, expected):
    recent = RecentSteps()
    for each in steps:
        recent.note(each)
    assert recent.step_s == expected


def test_how_slow_an_engine_is_is_what_it_said_last():
    recent = RecentSteps()
    assert recent.slowdown == 0.0
    for said in (1.5, 1.2345):
        recent.note(StepDone((), 1, 0, 0.01, slowdown=said))
    assert recent.slowdown == 1.23


def test_a_fuller_cache_is_told_by_steps_and_not_too_often():
    now_s = 50.0
    kv = KvShare(lambda: now_s)

    def used(blocks: int) -> bool:
        return kv.note(StepDone((), 1, 0, 0.01, kv_blocks=100, kv_used_blocks=blocks))

    assert not used(9), "less than a step"
    assert used(10)
    assert kv.tell() == 0.1
    assert not used(95), "told a moment ago"
    now_s += KV_INTERVAL_S
    assert used(95)
    assert kv.tell() == 0.95
    now_s += KV_INTERVAL_S
    assert not used(90)
    assert used(80), "emptier is news too"
    assert kv.tell() == 0.8
    now_s += KV_INTERVAL_S
    assert not kv.note(StepDone((), 0, 0, 0.01)), "an engine that does not say changes nothing"


def test_idle_tells_an_empty_cache_and_the_next_fill_is_news():
    now_s = 50.0
    kv = KvShare(lambda: now_s)
    full = StepDone((), 1, 0, 0.01, kv_blocks=100, kv_used_blocks=80)
    assert kv.note(full)
    assert kv.tell() == 0.8
    assert kv.tell(is_idle=True) == 0.0
    assert kv.tell() == 0.0, "busy again, before its first step"
    now_s += KV_INTERVAL_S
    assert kv.note(full)


class Desk:
    def __init__(self) -> None:
        self.now_s, self.told = 100.0, 0
        self.has_told = asyncio.Event()
        self.news = JobNews(self._tell, lambda: self.now_s, interval_s=1.0)

    def _tell(self) -> None:
        self.told += 1
        self.has_told.set()


async def test_many_changes_are_told_once_and_steps_when_the_interval_is_over():
    desk = Desk()
    for _ in range(20):
        desk.news.jobs_changed()
        desk.news.jobs_advanced()
    async with asyncio.timeout(5):
        await desk.has_told.wait()
    assert desk.told == 1
    for at_s, told in ((100.5, 1), (101.0, 2), (101.9, 2), (102.1, 3)):
        desk.now_s = at_s
        desk.news.jobs_advanced()
        assert desk.told == told


async def test_a_change_within_the_interval_waits_for_its_end_and_for_nothing_once_stopped():
    desk = Desk()
    desk.news.jobs_advanced()
    desk.now_s = 100.99
    desk.news.jobs_changed()
    assert desk.told == 1
    async with asyncio.timeout(5):
        desk.has_told.clear()
        await desk.has_told.wait()
    assert desk.told == 2
    desk.news.jobs_changed()
    desk.news.stop()
    desk.now_s = 200.0
    desk.news.stop()
    assert desk.told == 2
