"""The router's service and its queue: jobs that wait, and a queue that loses or refuses them."""

import asyncio

import pytest

from gearfall.core.errors import DeadlineExceeded, Overloaded, Unavailable
from gearfall.core.generation.job import Priority
from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState
from services.router.service import RouterLimits
from tests.services.router.char_models import ids_of
from tests.services.router.rig import Answer, Rig, ScriptedWorker, running_rig


async def _held_below(rig: Rig) -> ScriptedWorker:
    """A cascade whose worker holds every lower answer, which is to go up, at its first token."""
    await rig.add_model("small")
    await rig.add_model("large")
    await rig.deploy("both", ("small", 0.9), ("large", None))
    worker = rig.worker(small=Answer("wrong", logprob=-3.0), large=Answer("right"))
    worker.hold_at = 0
    return worker


async def test_demand_is_kept_true_and_taken_back():
    async with running_rig() as rig:
        await rig.add_model("small", ready=False)
        asking = [asyncio.create_task(rig.ask("small", max_tokens=7)) for _ in range(20)]
        key = (ModelName("small"), rig.router.router_id)
        await rig.until(lambda: key in rig.cluster.view.demand)
        await rig.until(lambda: rig.router.demand.waiting.get(ModelName("small")) == 20)
        await rig.until(lambda: rig.cluster.view.demand[key].waiting_jobs >= 16)
        record = rig.cluster.view.demand[key]
        assert record.prompt_tokens == record.waiting_jobs * (1 + len(ids_of("hi")))
        assert record.output_tokens == record.waiting_jobs * 7
        rig.worker(small=Answer("hello"))
        outcomes = await asyncio.gather(*asking)
        assert {outcome.text() for outcome in outcomes} == {"hello"}
        assert all(outcome.waits[0].expected_s > 0 for outcome in outcomes)
        await rig.until(lambda: key not in rig.cluster.view.demand)


async def test_load_says_what_came_and_what_came_of_it():
    async with running_rig() as rig:
        await rig.add_model("small")
        key = (ModelName("small"), rig.router.router_id)
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: key in rig.cluster.view.load)
        assert rig.cluster.view.load[key].unfinished_jobs == 1
        rig.worker(small=Answer("hello"))
        await asking
        await rig.until(lambda: rig.cluster.view.load[key].unfinished_jobs == 0)
        record = rig.cluster.view.load[key]
        assert (record.arrived_jobs, record.arrived_prompt_tokens) == (1, 1 + len(ids_of("hi")))
        assert record.produced_tokens == len("hello") + 1


async def test_demand_is_put_for_a_job_that_waits_despite_a_ready_replica():
    async with running_rig() as rig:
        await rig.add_model("small")
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(
            lambda: (ModelName("small"), rig.router.router_id) in rig.cluster.view.demand
        )
        rig.worker(small=Answer("hello"))
        assert (await asking).waits == []


async def test_a_job_whose_entry_a_worker_without_a_stream_holds_is_appended_again():
    async with running_rig() as rig:
        await rig.add_model("small")
        asked = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: bool(rig.queue_server.queues.get(ModelName("small"))))
        (held,) = await rig.queue.claim(ModelName("small"), "dead", max_jobs=1, block_s=0)
        await rig.until(lambda: len(rig.queue_server.queues[ModelName("small")]) > 1)
        worker = rig.worker(small=Answer("hello"))
        outcome = await asked
        assert outcome.text() == "hello"
        assert outcome.ends[0].stages[0].epochs == 1, "nobody else ever owned it"
        assert {job.epoch for job in worker.jobs} > {held.job.epoch}


async def test_a_queue_that_lost_its_data_gets_the_jobs_again():
    async with running_rig() as rig:
        await rig.add_model("small")
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: bool(rig.queue_server.queues.get(ModelName("small"))))
        rig.queue_server.flush()
        await rig.until(lambda: bool(rig.queue_server.queues.get(ModelName("small"))))
        rig.worker(small=Answer("hello"))
        assert (await asking).text() == "hello"


async def test_a_queue_that_is_down_is_waited_for():
    async with running_rig() as rig:
        await rig.add_model("small")
        rig.queue_server.stop()
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: len(rig.router.jobs) == 1)
        rig.queue_server.start()
        rig.worker(small=Answer("hello"))
        assert (await asking).text() == "hello"


async def test_a_queue_that_stays_down_is_unavailable():
    async with running_rig(limits=RouterLimits(queue_patience_s=0.1, stop_grace_s=0.0)) as rig:
        await rig.add_model("small")
        rig.queue_server.stop()
        with pytest.raises(Unavailable) as caught:
            await rig.ask("small")
        assert caught.value.retry_after_s
        rig.queue_server.start()


async def test_a_full_queue_refuses_what_is_new_and_not_what_runs():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.hold_at, worker.die_at = 2, {2: 1}
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: bool(worker.jobs))
        rig.queue_server.is_full = True
        with pytest.raises(Overloaded):
            await rig.ask("small")
        worker.gate.set()
        await rig.until(lambda: rig.queue_server.refused > 2)
        rig.queue_server.is_full = False
        assert (await asking).text() == "hello"


async def test_an_answer_that_goes_up_waits_for_room_in_a_full_queue():
    async with running_rig() as rig:
        worker = await _held_below(rig)
        asking = asyncio.create_task(rig.ask("both"))
        await rig.until(lambda: bool(worker.jobs))
        rig.queue_server.is_full = True
        worker.gate.set()
        await rig.until(lambda: rig.queue_server.refused > 1)
        rig.queue_server.is_full = False
        assert (await asking).text() == "right"


async def test_a_queue_that_stays_full_ends_an_answer_that_goes_up():
    async with running_rig(limits=RouterLimits(queue_patience_s=0.1, stop_grace_s=0.0)) as rig:
        worker = await _held_below(rig)
        asking = asyncio.create_task(rig.ask("both"))
        await rig.until(lambda: bool(worker.jobs))
        rig.queue_server.is_full = True
        worker.gate.set()
        with pytest.raises(Overloaded, match="full") as caught:
            await asking
        assert caught.value.retry_after_s
        assert rig.queue_server.refused > 1


async def test_a_full_queue_refuses_a_new_question_at_every_stage_at_once():
    async with running_rig() as rig:
        await _held_below(rig)
        rig.queue_server.is_full = True
        with pytest.raises(Overloaded):
            await rig.ask("both")
        assert rig.queue_server.refused == 2


async def test_a_deadline_ends_the_wait():
    async with running_rig() as rig:
        await rig.add_model("small")
        with pytest.raises(DeadlineExceeded):
            await rig.ask("small", timeout_s=0.05)
        await rig.until(lambda: not any(rig.queue_server.queues.values()))


@pytest.mark.parametrize("is_ready", [False, True])
async def test_a_cold_model_is_asked_for_before_its_tokenizer_is_read(is_ready):
    async with running_rig() as rig:
        await rig.add_model("small", ready=is_ready)
        rig.files.gate.clear()
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: rig.files.waiting > 0)
        if not is_ready:
            await rig.until(lambda: bool(rig.cluster.view.demand))
            (record,) = rig.cluster.view.demand.values()
            assert (record.model, record.waiting_jobs) == ("small", 1)
        assert not rig.router.jobs.waiting(ModelName("small"))
        assert bool(rig.router.demand.wanted) != is_ready
        rig.files.gate.set()
        rig.worker(small=Answer("hello"))
        await rig.set_replica("small", ReplicaState.READY)
        assert (await asking).text() == "hello"
        await rig.until(lambda: not rig.cluster.view.demand)


@pytest.mark.parametrize(("max_tokens", "told"), [(None, 200), (7, 7), (2**31 - 1, 200)])
async def test_what_is_told_early_is_no_more_than_the_model_could_write(max_tokens, told):
    async with running_rig() as rig:
        await rig.add_model("small", ready=False, context_tokens=200)
        rig.files.gate.clear()
        asking = asyncio.create_task(rig.ask("small", max_tokens=max_tokens))
        await rig.until(lambda: bool(rig.cluster.view.demand))
        (record,) = rig.cluster.view.demand.values()
        assert record.output_tokens == told
        rig.files.gate.set()
        rig.worker(small=Answer("hello"))
        assert (await asking).text() == "hello"


async def test_a_batch_request_is_told_as_one_when_it_waits_and_not_before():
    async with running_rig() as rig:
        await rig.add_model("small", ready=False)
        rig.files.gate.clear()
        asking = asyncio.create_task(rig.ask("small", priority=Priority.BATCH))
        await rig.until(lambda: rig.files.waiting > 0)
        assert not rig.router.demand.wanted
        rig.files.gate.set()
        await rig.until(lambda: bool(rig.cluster.view.demand))
        (record,) = rig.cluster.view.demand.values()
        assert (record.waiting_jobs, record.batch_jobs) == (1, 1)
        rig.worker(small=Answer("hello"))
        assert (await asking).text() == "hello"
