"""The demand board on a clock that jumps: what is written, when, and that it ends up true."""

import asyncio
import time
from itertools import pairwise
from typing import cast

import pytest

from gearfall.core.errors import Unavailable
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import DemandRecord
from services.router.jobs.backlog import Backlog
from services.router.jobs.demand import (
    HINTED_S,
    OVERDUE_S,
    PACE_S,
    REWRITE_S,
    WANTED_S,
    DemandBoard,
)
from tests.services.router.virtual_time import run_virtually

MODEL = ModelName("small")
ROUTER = RouterId("router-a")
LEASE = cast("Lease", object())


class Etcd:
    """Holds what is written, with the loop's time of each write."""

    def __init__(self) -> None:
        self.records: dict[ModelName, DemandRecord] = {}
        self.puts: list[tuple[float, DemandRecord]] = []
        self.is_down = False

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        self._answer()
        self.puts.append((asyncio.get_running_loop().time(), record))
        self.records[record.model] = record
        return len(self.puts)

    async def delete_demand(self, model: ModelName, router_id: RouterId) -> int:
        self._answer()
        return len(self.puts) if self.records.pop(model, None) else 0

    def _answer(self) -> None:
        if self.is_down:
            raise Unavailable("etcd is down")


class Rig:
    """A board that runs, with its etcd."""

    def __init__(self, *, ready: bool = False, etcd: Etcd | None = None) -> None:
        self.etcd = etcd or Etcd()
        self.is_ready = ready
        self.board = DemandBoard(self.etcd, ROUTER, lambda _: self.is_ready)
        self.began_s = asyncio.get_running_loop().time()

    async def __aenter__(self) -> "Rig":
        self._task = asyncio.create_task(self.board.run())
        self.board.set_lease(LEASE)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def after(self, at_s: float) -> None:
        """Go on once the loop's clock has come to `at_s` since the rig began."""
        loop = asyncio.get_running_loop()
        reached = loop.create_future()
        loop.call_at(self.began_s + at_s, reached.set_result, None)
        await reached

    def jobs(self) -> list[tuple[float, int]]:
        """Return (time since the rig began, waiting jobs) of every put."""
        return [
            (round(at_s - self.began_s, 6), record.waiting_jobs) for at_s, record in self.etcd.puts
        ]


def test_a_cold_model_is_told_at_once_and_taken_back_when_nothing_waits():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.set_waiting(MODEL, Backlog(2, 7.0, 30, 40, 1))
            await rig.after(0.01)
            assert rig.etcd.records[MODEL] == DemandRecord(MODEL, ROUTER, 2, 7.0, 30, 40, 1)
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(0.02)
            assert not rig.etcd.records
            assert rig.board.waiting == {}

    run_virtually(play())


def test_jobs_of_a_ready_model_are_told_when_they_wait_too_long():
    async def play() -> None:
        async with Rig(ready=True) as rig:
            rig.board.set_waiting(MODEL, Backlog(1, 7.0))
            await rig.after(OVERDUE_S / 2)
            rig.board.set_waiting(MODEL, Backlog(3, 7.0))
            await rig.after(OVERDUE_S * 2)
            assert rig.jobs() == [(OVERDUE_S, 3)]

    run_virtually(play())


def test_jobs_that_are_claimed_in_time_are_never_told():
    async def play() -> None:
        async with Rig(ready=True) as rig:
            for turn in range(5):
                rig.board.set_waiting(MODEL, Backlog(1, 7.0))
                await rig.after(0.3 * turn + OVERDUE_S / 2)
                rig.board.set_waiting(MODEL, Backlog())
                await rig.after(0.3 * (turn + 1))
            assert rig.jobs() == []

    run_virtually(play())


def test_the_count_stays_true_at_a_bounded_rate():
    async def play() -> None:
        async with Rig() as rig:
            for turn in range(1, 401):
                rig.board.set_waiting(MODEL, Backlog(turn, 7.0))
                await rig.after(turn / 400)
            await rig.after(2.0)
            times, said = zip(*rig.jobs(), strict=True)
            assert said[0] == 1
            assert said[-1] * 1.25 >= 400
            assert all(after - before >= REWRITE_S - 1e-6 for before, after in pairwise(times))
            assert len(said) <= 11

    run_virtually(play())


def test_small_changes_are_not_told():
    async def play() -> None:
        async with Rig() as rig:
            for jobs in (40, 44, 48, 50, 45, 31):
                rig.board.set_waiting(MODEL, Backlog(jobs, 7.0))
                await rig.after(jobs % 7 + 1.0)
            assert [said for _, said in rig.jobs()] == [40]

    run_virtually(play())


def test_thousands_of_models_share_one_rate():
    async def play() -> None:
        async with Rig() as rig:
            models = [ModelName(f"model-{n}") for n in range(2000)]
            for turn in range(1, 4):
                for model in models:
                    rig.board.set_waiting(model, Backlog(10**turn, 7.0))
                await rig.after(turn * 0.01)
            told = len(rig.etcd.puts)
            assert told == len(models)
            await rig.after(60.0)
            assert {record.waiting_jobs for record in rig.etcd.records.values()} == {1000}
            assert len(rig.etcd.puts) == 2 * len(models)
            # Every model waits as long as all of them take at the pace.
            assert min(at_s for at_s, _ in rig.jobs()[told:]) >= PACE_S * len(models) - 0.1

    run_virtually(play())


@pytest.mark.parametrize("ready", [False, True])
def test_what_could_not_be_written_is_tried_again(ready):
    async def play() -> None:
        async with Rig() as rig:
            rig.etcd.is_down = True
            rig.board.set_waiting(MODEL, Backlog(4, 7.0))
            await rig.after(1.2)
            rig.is_ready = ready
            rig.etcd.is_down = False
            await rig.after(2.0)
            assert rig.etcd.records[MODEL].waiting_jobs == 4
            rig.etcd.is_down = True
            rig.board.set_waiting(MODEL, Backlog(9, 7.0))
            await rig.after(2.5)
            rig.etcd.is_down = False
            await rig.after(3.5)
            assert rig.etcd.records[MODEL].waiting_jobs == 9
            rig.etcd.is_down = True
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(4.5)
            rig.etcd.is_down = False
            await rig.after(5.5)
            assert not rig.etcd.records

    run_virtually(play())


def test_a_new_lease_writes_again_what_stood_under_the_old_one():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.set_waiting(MODEL, Backlog(4, 7.0))
            await rig.after(0.1)
            rig.etcd.records.clear()
            rig.is_ready = True
            rig.board.set_lease(LEASE)
            await rig.after(0.2)
            assert rig.etcd.records[MODEL].waiting_jobs == 4

    run_virtually(play())


def test_a_wanted_model_is_one_waiting_job_until_it_is_ready():
    async def play() -> None:
        async with Rig() as rig:
            for _ in range(100):
                rig.board.want(MODEL, 30, 40)
            await rig.after(0.1)
            record = rig.etcd.records[MODEL]
            assert (record.waiting_jobs, record.prompt_tokens, record.output_tokens) == (1, 30, 40)
            assert len(rig.etcd.puts) == 1
            assert rig.board.waiting == {}, "nobody waits in the queue"
            rig.is_ready = True
            rig.board.replicas_changed()
            await rig.after(0.2)
            assert not rig.etcd.records

    run_virtually(play())


def test_a_model_that_nobody_wants_any_more_is_taken_back():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.want(MODEL, 30, 40)
            await rig.after(WANTED_S - 1)
            rig.board.want(MODEL, 30, 40)
            await rig.after(WANTED_S + 1)
            assert MODEL in rig.etcd.records
            await rig.after(2 * WANTED_S)
            assert not rig.etcd.records

    run_virtually(play())


def test_jobs_that_wait_count_instead_of_the_want():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.want(MODEL, 30, 40)
            rig.board.set_waiting(MODEL, Backlog(5, 7.0))
            await rig.after(0.5)
            assert rig.etcd.records[MODEL].waiting_jobs == 5
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(1.0)
            assert rig.etcd.records[MODEL].waiting_jobs == 1

    run_virtually(play())


def test_a_model_that_a_job_is_on_its_way_for_is_wanted_until_it_waits():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.want_early(MODEL, 40)
            await rig.after(0.1)
            assert rig.etcd.records[MODEL].waiting_jobs == 1
            rig.board.set_waiting(MODEL, Backlog(3, 7.0))
            rig.board.want_early(MODEL, 40)
            await rig.after(0.5)
            assert rig.etcd.records[MODEL].waiting_jobs == 3
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(0.5)
            assert not rig.etcd.records

    run_virtually(play())


def test_a_job_that_never_came_is_forgotten_and_an_answer_without_the_model_is_not():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.want_early(MODEL, 40)
            await rig.after(WANTED_S + 1)
            assert not rig.etcd.records
            rig.board.want_early(MODEL, 40)
            rig.board.want(MODEL, 30, 40)
            rig.board.set_waiting(MODEL, Backlog(3, 7.0))
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(1.0)
            assert rig.etcd.records[MODEL].waiting_jobs == 1

    run_virtually(play())


def test_hints_are_no_waiting_jobs_and_pass():
    async def play() -> None:
        async with Rig() as rig:
            for turn in range(20):
                rig.board.hint(MODEL)
                await rig.after(turn * 0.1)
            record = rig.etcd.records[MODEL]
            assert (record.waiting_jobs, record.hinted_jobs) == (0, 1)
            assert len(rig.etcd.puts) == 1, "drafts that come and go write nothing"
            rig.board.set_waiting(MODEL, Backlog(2, 7.0))
            await rig.after(2.5)
            record = rig.etcd.records[MODEL]
            assert record.waiting_jobs == 2
            assert record.hinted_jobs > 0
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(2.5 + 2 * HINTED_S)
            assert not rig.etcd.records

    run_virtually(play())


def test_a_ready_model_is_neither_wanted_nor_hinted():
    async def play() -> None:
        async with Rig(ready=True) as rig:
            rig.board.hint(MODEL)
            rig.board.want(MODEL, 1, 1)
            await rig.after(0.1)
            assert not rig.etcd.puts

    run_virtually(play())


def test_what_is_wanted_is_written_again_after_an_outage_and_under_a_new_lease():
    async def play() -> None:
        async with Rig() as rig:
            rig.etcd.is_down = True
            rig.board.want(MODEL, 1, 1)
            await rig.after(0.2)
            rig.etcd.is_down = False
            await rig.after(1.0)
            assert rig.etcd.records[MODEL].waiting_jobs == 1
            rig.etcd.records.clear()
            rig.board.set_lease(LEASE)
            await rig.after(1.1)
            assert rig.etcd.records[MODEL].waiting_jobs == 1

    run_virtually(play())


def test_the_oldest_wait_is_that_of_who_a_job_waits_behind():
    async def play() -> None:
        async with Rig(ready=True) as rig:
            now = time.time()
            backlog = Backlog(3, now - 600, batch_jobs=2, interactive_since_unix_s=now - 5)
            assert rig.board.oldest_wait_s(MODEL, is_batch=True) == 0.0
            rig.board.set_waiting(MODEL, backlog)
            assert rig.board.oldest_wait_s(MODEL, is_batch=True) == pytest.approx(600, abs=2)
            assert rig.board.oldest_wait_s(MODEL, is_batch=False) == pytest.approx(5, abs=2)
            rig.board.set_waiting(MODEL, Backlog(2, now - 600, batch_jobs=2))
            assert rig.board.oldest_wait_s(MODEL, is_batch=False) == 0.0

    run_virtually(play())
