"""How the demand board writes: side by side, a model's writes one by one, whatever one meets."""

import asyncio
import contextlib
import time

from gearfall.core.ids import ModelName, RouterId
from gearfall.core.ports import Lease
from gearfall.core.records import DemandRecord
from services.router.jobs.backlog import Backlog
from services.router.jobs.demand import MOST_AT_ONCE
from tests.services.router.jobs.test_demand import MODEL, Etcd, Rig
from tests.services.router.virtual_time import run_virtually

OTHER = ModelName("other")


class SlowEtcd(Etcd):
    """Takes each write a second after it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.on_its_way: list[ModelName] = []
        self.most = 0

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        async with self._sent(record.model):
            return await super().put_demand(record, lease=lease)

    async def delete_demand(self, model: ModelName, router_id: RouterId) -> int:
        async with self._sent(model):
            return await super().delete_demand(model, router_id)

    @contextlib.asynccontextmanager
    async def _sent(self, model: ModelName):
        assert model not in self.on_its_way, "a model's writes could pass each other"
        self.on_its_way.append(model)
        self.most = max(self.most, len(self.on_its_way))
        loop = asyncio.get_running_loop()
        taken = loop.create_future()
        loop.call_later(1.0, taken.set_result, None)
        await taken
        yield
        self.on_its_way.remove(model)


def test_models_that_come_at_once_do_not_wait_for_each_others_writes():
    async def scenario():
        etcd = SlowEtcd()
        async with Rig(etcd=etcd) as rig:
            names = [ModelName(f"m{number}") for number in range(MOST_AT_ONCE + 3)]
            for name in names:
                rig.board.set_waiting(name, Backlog(1, time.time()))
            await rig.after(1.5)
            assert len(etcd.records) == MOST_AT_ONCE == etcd.most
            await rig.after(2.5)
            assert etcd.records.keys() == set(names)

    run_virtually(scenario())


def test_the_last_word_on_a_model_stands_however_slow_its_writes_are():
    async def scenario():
        async with Rig(etcd=SlowEtcd()) as rig:
            rig.board.set_waiting(MODEL, Backlog(1, time.time()))
            await rig.after(0.5)
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(0.7)
            rig.board.set_waiting(MODEL, Backlog(9, time.time()))
            await rig.after(5.0)
            assert rig.etcd.records[MODEL].waiting_jobs == 9
            rig.board.set_waiting(MODEL, Backlog())
            await rig.after(8.0)
            assert not rig.etcd.records

    run_virtually(scenario())


class RefusingEtcd(Etcd):
    """Fails in a way that nobody expects for one model, as often as it is told to."""

    refusals = 0

    async def put_demand(self, record: DemandRecord, *, lease: Lease) -> int:
        if record.model == MODEL and self.refusals:
            self.refusals -= 1
            raise OverflowError("int too large to convert to float")
        return await super().put_demand(record, lease=lease)


def test_a_record_that_can_not_be_written_keeps_no_other_from_being_written():
    async def scenario():
        etcd = RefusingEtcd()
        etcd.refusals = 2
        async with Rig(etcd=etcd) as rig:
            rig.board.set_waiting(MODEL, Backlog(1, 7.0))
            await rig.after(0.1)
            rig.board.set_waiting(OTHER, Backlog(2, 7.0))
            await rig.after(0.2)
            assert etcd.records.keys() == {OTHER}
            await rig.after(2.0)
            assert etcd.records.keys() == {MODEL, OTHER}, "it is tried again"

    run_virtually(scenario())
