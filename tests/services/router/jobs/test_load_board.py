"""The load board on a clock that jumps: its rate is bounded, and what it writes ends up true."""

import asyncio
import random
from collections import defaultdict
from itertools import pairwise
from typing import cast

from gearfall.core.errors import Unavailable
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import LoadRecord
from services.router.jobs.load_board import BEHIND_S, EVERY_S, IDLE_S, PACE_S, LoadBoard
from tests.services.router.virtual_time import run_virtually

MODEL = ModelName("small")
ROUTER = RouterId("router-a")
LEASE = cast("Lease", object())


class Etcd:
    """Holds what is written, with the loop's time of each write."""

    def __init__(self) -> None:
        self.records: dict[ModelName, LoadRecord] = {}
        self.writes: list[tuple[float, ModelName]] = []
        self.is_down = False

    async def put_load(self, record: LoadRecord, *, lease: Lease) -> int:
        self._note(record.model)
        self.records[record.model] = record
        return len(self.writes)

    async def delete_load(self, model: ModelName, router_id: RouterId) -> int:
        self._note(model)
        del self.records[model]
        return len(self.writes)

    def _note(self, model: ModelName) -> None:
        self.writes.append((asyncio.get_running_loop().time(), model))
        if self.is_down:
            raise Unavailable("etcd is down")


class Rig:
    """A board that runs, with its etcd."""

    def __init__(self) -> None:
        self.etcd = Etcd()
        self.began_s = asyncio.get_running_loop().time()
        self.board = LoadBoard(self.etcd, ROUTER, clock=self.clock)

    def clock(self) -> float:
        """Return the seconds since the rig began."""
        return asyncio.get_running_loop().time() - self.began_s

    async def __aenter__(self) -> "Rig":
        self._task = asyncio.create_task(self.board.run())
        self.board.set_lease(LEASE)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.board.check()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def after(self, at_s: float) -> None:
        """Go on once the clock has come to `at_s`."""
        loop = asyncio.get_running_loop()
        reached = loop.create_future()
        loop.call_at(self.began_s + at_s, reached.set_result, None)
        await reached
        self.board.check()


def test_the_first_job_is_told_with_its_prompt_behind_the_demand_that_it_may_be():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.arrived(MODEL, 12)
            await rig.after(BEHIND_S - 0.01)
            assert not rig.etcd.writes
            await rig.after(BEHIND_S + 0.01)
            (told,) = rig.etcd.records.values()
            assert told == LoadRecord(MODEL, ROUTER, told.at_unix_s, 1, 12, 0, 1)

    run_virtually(play())


def test_a_busy_model_is_told_once_a_second():
    async def play() -> None:
        async with Rig() as rig:
            for step in range(1000):
                rig.board.arrived(MODEL, 3)
                rig.board.produced(MODEL, 5)
                if step >= 10:
                    rig.board.ended(MODEL)
                await rig.after(0.01 * (step + 1))
            await rig.after(12.0)
            times = [at_s for at_s, _ in rig.etcd.writes]
            assert len(times) == 11
            assert all(after - before >= EVERY_S - 1e-6 for before, after in pairwise(times))
            record = rig.etcd.records[MODEL]
            assert (record.arrived_jobs, record.arrived_prompt_tokens) == (1000, 3000)
            assert (record.produced_tokens, record.unfinished_jobs) == (5000, 10)

    run_virtually(play())


def test_an_idle_model_has_no_record_and_its_totals_go_on():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.arrived(MODEL, 1)
            rig.board.ended(MODEL)
            await rig.after(IDLE_S - 1.0)
            assert rig.etcd.records[MODEL].unfinished_jobs == 0
            await rig.after(IDLE_S + 2.0)
            assert not rig.etcd.records
            rig.board.arrived(MODEL, 1)
            await rig.after(IDLE_S + 3.0)
            assert rig.etcd.records[MODEL].arrived_jobs == 2

    run_virtually(play())


def test_a_long_job_keeps_its_record():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.arrived(MODEL, 1)
            await rig.after(10 * IDLE_S)
            assert rig.etcd.records[MODEL].unfinished_jobs == 1
            assert len(rig.etcd.writes) == 1

    run_virtually(play())


def test_thousands_of_models_share_one_rate_and_each_gets_its_turn():
    async def play() -> None:
        async with Rig() as rig:
            models = [ModelName(f"model-{n}") for n in range(1000)]
            for second in range(100):
                for model in models:
                    rig.board.arrived(model, 1)
                    rig.board.ended(model)
                await rig.after(second + 1.0)
            times = [at_s for at_s, _ in rig.etcd.writes]
            assert all(after - before >= PACE_S - 1e-6 for before, after in pairwise(times))
            assert len(times) >= 0.99 * 100.0 / PACE_S
            turns = defaultdict(list)
            for at_s, model in rig.etcd.writes:
                turns[model].append(at_s)
            assert set(turns) == set(models)
            most_s = max(b - a for each in turns.values() for a, b in pairwise(each))
            assert most_s <= 1.1 * PACE_S * len(models)

    run_virtually(play())


def test_an_outage_costs_no_count():
    async def play() -> None:
        async with Rig() as rig:
            dice = random.Random(1)
            arrived: defaultdict[ModelName, int] = defaultdict(int)
            running: defaultdict[ModelName, int] = defaultdict(int)
            for step in range(300):
                rig.etcd.is_down = 100 <= step < 200
                model = ModelName(f"model-{dice.randrange(5)}")
                if running[model] and dice.random() < 0.5:
                    rig.board.ended(model)
                    running[model] -= 1
                else:
                    rig.board.arrived(model, 2)
                    arrived[model] += 1
                    running[model] += 1
                await rig.after(0.1 * (step + 1))
            await rig.after(40.0)
            for model, count in arrived.items():
                record = rig.etcd.records[model]
                assert (record.arrived_jobs, record.unfinished_jobs) == (count, running[model])

    run_virtually(play())


def test_a_new_lease_writes_again_what_runs():
    async def play() -> None:
        async with Rig() as rig:
            rig.board.arrived(MODEL, 1)
            rig.board.arrived(ModelName("idle"), 1)
            rig.board.ended(ModelName("idle"))
            await rig.after(5.0)
            rig.etcd.records.clear()
            rig.board.set_lease(LEASE)
            await rig.after(6.0)
            assert list(rig.etcd.records) == [MODEL]
            await rig.after(IDLE_S + 6.0)
            assert list(rig.etcd.records) == [MODEL]

    run_virtually(play())


def test_without_a_lease_nothing_is_written_and_nothing_lost():
    async def play() -> None:
        etcd = Etcd()
        board = LoadBoard(etcd, ROUTER)
        task = asyncio.create_task(board.run())
        board.arrived(MODEL, 1)
        loop = asyncio.get_running_loop()
        for moment_s in (5.0, 6.0):
            reached = loop.create_future()
            loop.call_at(1000.0 + moment_s, reached.set_result, None)
            await reached
            if moment_s == 5.0:
                assert not etcd.writes
                board.set_lease(LEASE)
        assert etcd.records[MODEL].arrived_jobs == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtually(play())
