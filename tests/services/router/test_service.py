"""The router's service with a scripted worker behind the real TokenSink."""

import asyncio

import pytest

from gearfall.core.errors import (
    Conflict,
    GearfallError,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from gearfall.core.generation.job import FinishReason
from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord
from services.router.generation import GenerationRequest, TextPrompt, TokenPrompt
from services.router.service import RouterLimits
from tests.services.router.char_models import BOS_ID, ids_of
from tests.services.router.rig import Answer, Outcome, running_rig


async def test_answers_with_usage_and_cost():
    async with running_rig() as rig:
        await rig.add_model("small", parameters=1000)
        worker = rig.worker(small=Answer("hello"))
        outcome = await rig.ask("small", "hi")
        assert outcome.text() == "hello"
        (end,) = outcome.ends
        assert (end.finish, end.model) == (FinishReason.STOP, "small")
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (3, 6)
        assert end.usage.cost_flops == 2 * 1000 * 9
        assert worker.jobs[0].prompt_token_ids == (BOS_ID, *ids_of("hi"))
        assert rig.router.service.running_requests == 0
        assert rig.router.service.admission.running_choices == 0


@pytest.mark.parametrize("index", range(6))
async def test_worker_death_at_any_token_changes_nothing(index):
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.die_at = {index: 1}
        outcome = await rig.ask("small")
        assert outcome.text() == "hello"
        (report,) = outcome.ends[0].stages
        assert (report.epochs, report.completion_tokens) == (2, 6)
        assert worker.jobs[1].generated_token_ids == ids_of("hello")[:index]
        assert [job.epoch for job in worker.jobs] == [1, 2]


async def test_repeated_runs_are_dropped():
    async with running_rig() as rig:
        await rig.add_model("small")
        rig.worker(small=Answer("hello")).repeat = True
        assert (await rig.ask("small")).text() == "hello"


async def test_a_job_that_kills_its_owners_ends_with_an_error():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.die_at = {2: 100}
        with pytest.raises(Internal, match="without a token"):
            await rig.ask("small")
        # The first owner brought two tokens, so five barren ones follow it.
        assert len(worker.jobs) == 6


async def test_closing_stops_the_owner():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.hold_at = 2
        running = await rig.router.service.start(GenerationRequest("small", (TextPrompt("hi"),)))
        await worker.held.wait()
        running.close()
        await worker.replied.wait()
        assert [stop.job_id for stop in worker.stops] == [worker.jobs[0].job_id]
        assert len(rig.router.jobs) == 0


async def test_closing_takes_an_unclaimed_job_out_of_the_queue():
    async with running_rig() as rig:
        await rig.add_model("small")
        running = await rig.router.service.start(GenerationRequest("small", (TextPrompt("hi"),)))
        await rig.until(lambda: bool(rig.queue_server.queues.get(ModelName("small"))))
        running.close()
        await rig.until(lambda: not rig.queue_server.queues[ModelName("small")])
        assert not rig.router.demand.waiting


async def test_cancel_by_id_ends_with_cancelled():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        worker.hold_at = 2
        asking = asyncio.create_task(rig.ask("small", request_id="mine"))
        await worker.held.wait()
        rig.router.service.cancel("mine")
        outcome = await asking
        assert outcome.ends[0].finish is FinishReason.CANCELLED
        with pytest.raises(NotFound):
            rig.router.service.cancel("mine")


async def test_a_request_that_is_cancelled_while_its_prompt_is_read_computes_nothing():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        reading, gate, read_file = asyncio.Event(), asyncio.Event(), rig.files.read_file

        async def held(model: ModelRecord, file: str) -> bytes:
            reading.set()
            await gate.wait()
            return await read_file(model, file)

        rig.files.read_file = held  # type: ignore[method-assign]
        request = GenerationRequest("small", (TextPrompt("hi"),), request_id="mine")
        starting = asyncio.create_task(rig.router.service.start(request))
        await reading.wait()
        rig.router.service.cancel("mine")
        gate.set()
        running = await starting
        events = [each async for batch in running.batches() for each in batch]
        await running.wait_stopped()
        assert Outcome(events).ends[0].finish is FinishReason.CANCELLED
        assert worker.jobs == []
        assert rig.router.service.admission.running_choices == 0


@pytest.mark.parametrize(
    ("stop", "text"), [("lo", "hel"), ("ell", "h"), ("h", ""), ("xyz", "hello"), ("lox", "hello")]
)
async def test_stop_strings_cross_token_borders(stop, text):
    async with running_rig() as rig:
        await rig.add_model("small")
        rig.worker(small=Answer("hello"))
        outcome = await rig.ask("small", stop=(stop,))
        assert outcome.text() == text
        assert outcome.ends[0].finish is FinishReason.STOP
        await rig.until(lambda: not any(rig.queue_server.queues.values()))


async def test_n_choices_have_their_own_seeds():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker(small=Answer("hello"))
        outcome = await rig.ask("small", n=3, seed=2**64 - 1)
        assert [outcome.text(choice) for choice in range(3)] == ["hello"] * 3
        assert sorted(job.sampling.seed for job in worker.jobs) == [0, 1, 2**64 - 1]


async def test_max_tokens_is_cut_to_the_context():
    async with running_rig() as rig:
        await rig.add_model("small", context_tokens=6)
        worker = rig.worker(small=Answer("hello"))
        outcome = await rig.ask("small", "hi", max_tokens=10**9)
        assert worker.jobs[0].sampling.max_tokens == 3
        assert outcome.text() == "hel"
        assert outcome.ends[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [0, 2**31, 10**400])
def test_max_tokens_is_a_number_that_is_meant(max_tokens):
    with pytest.raises(InvalidRequest, match="max_tokens"):
        GenerationRequest("small", (TextPrompt("hi"),), max_tokens=max_tokens)


async def test_refusals():
    async with running_rig(limits=RouterLimits(max_choices=2, stop_grace_s=0.0)) as rig:
        await rig.add_model("small")
        with pytest.raises(NotFound) as missing:
            await rig.ask("nobody")
        assert missing.value.code == "model_not_found"
        with pytest.raises(Overloaded) as full:
            await rig.ask("small", n=3)
        assert full.value.retry_after_s
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await rig.router.service.start(GenerationRequest("small", (TokenPrompt((9999,)),)))
        first = await rig.router.service.start(
            GenerationRequest("small", (TextPrompt("hi"),), request_id="one")
        )
        with pytest.raises(Conflict):
            await rig.ask("small", request_id="one")
        first.close()
        assert rig.router.service.admission.running_choices == 0


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"n": 3}, "Overloaded"),
        ({"request_id": "one"}, "Conflict"),
    ],
)
async def test_a_refusal_is_counted_by_its_error(fields, outcome):
    async with running_rig(limits=RouterLimits(max_choices=2, stop_grace_s=0.0)) as rig:
        await rig.add_model("small")
        request = GenerationRequest("small", (TextPrompt("hi"),), request_id="one")
        first = await rig.router.service.start(request)
        for model in ("small", "small", "nobody"):
            with pytest.raises(GearfallError):
                await rig.ask(model, **fields)
        shown = rig.router.service.metrics.render(0, {}, {}).decode()
        assert f'gearfall_requests_total{{model="small",outcome="{outcome}"}} 2.0' in shown
        assert "nobody" not in shown, "a name that stands for nothing is not a label"
        first.close()


async def test_a_newer_stream_of_a_worker_fences_the_older():
    async with running_rig() as rig:
        await rig.add_model("small")
        worker = rig.worker("twin", small=Answer("hello"))
        worker.hold_at = 3
        asking = asyncio.create_task(rig.ask("small"))
        await worker.held.wait()
        rig.worker("twin", small=Answer("hello"))
        assert (await asking).text() == "hello"


async def test_the_tokenizer_is_fetched_once():
    async with running_rig() as rig:
        await rig.add_model("small")
        rig.worker(small=Answer("hello"))
        await asyncio.gather(*(rig.ask("small") for _ in range(10)))
        assert rig.files.reads == 4


async def test_a_request_whose_tokenizer_is_being_read_gets_the_grace_too():
    async with running_rig(limits=RouterLimits(stop_grace_s=20.0)) as rig:
        await rig.add_model("small")
        rig.worker(small=Answer("hello"))
        rig.files.gate.clear()
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: rig.files.waiting > 0)
        stopping = asyncio.create_task(rig.router.service.stop())
        await rig.until(lambda: rig.router.service.is_stopping)
        await rig.add_model("other")
        rig.files.gate.set()
        assert (await asking).text() == "hello"
        await stopping


async def test_a_request_whose_tokenizer_is_read_for_too_long_is_sent_elsewhere():
    async with running_rig(limits=RouterLimits(stop_grace_s=0.0)) as rig:
        await rig.add_model("small")
        await rig.add_model("large")
        await rig.deploy("both", ("small", 0.9), ("large", None))
        rig.files.gate.clear()
        asking = asyncio.create_task(rig.ask("both"))
        await rig.until(lambda: rig.files.waiting > 0)
        await rig.router.service.stop()
        with pytest.raises(Overloaded) as stopped:
            await asking
        assert stopped.value.retry_after_s
