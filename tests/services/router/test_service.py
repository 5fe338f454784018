"""The router's service with a scripted worker behind the real TokenSink."""

import asyncio

import pytest

from gearfall.core.errors import (
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from gearfall.core.ids import ModelName
from gearfall.core.job import FinishReason
from gearfall.core.records import ModelRecord, ReplicaState
from services.router.generation import GenerationRequest, TextPrompt, TokenPrompt
from services.router.service import RouterLimits
from tests.services.router.rig import (
    BOS_ID,
    Answer,
    Outcome,
    Rig,
    ids_of,
    probability,
    running_rig,
)


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


async def test_cascade_stops_at_the_first_certain_stage():
    async with running_rig() as rig:
        await rig.add_model("small", parameters=10)
        await rig.add_model("large", parameters=100)
        await rig.deploy("both", ("small", 0.5), ("large", None))
        rig.worker(small=Answer("sure", logprob=-0.01), large=Answer("never"))
        outcome = await rig.ask("both")
        assert outcome.text() == "sure"
        (report,) = outcome.ends[0].stages
        assert report.is_accepted
        assert report.certainty == pytest.approx(probability(-0.01, 5), rel=1e-5)


async def test_cascade_goes_up_and_shows_nothing_of_the_draft():
    async with running_rig() as rig:
        await rig.add_model("small", parameters=10)
        await rig.add_model("large", parameters=100)
        await rig.deploy("both", ("small", 0.5), ("large", None))
        rig.worker(small=Answer("wrong", logprob=-1.0), large=Answer("right"))
        outcome = await rig.ask("both", "hi")
        assert outcome.text() == "right"
        first, second = outcome.ends[0].stages
        assert [first.is_accepted, second.is_accepted] == [False, True]
        assert outcome.ends[0].model == "large"
        # The draft is stopped at its first token: exp(-1) is below the threshold.
        assert outcome.ends[0].usage.cost_flops == 2 * 10 * 4 + 2 * 100 * 9
        assert outcome.ends[0].usage.total_completion_tokens == 7
        decisions = [event.decision for event in _events_of_last(rig)]
        assert decisions[:3] == ["finished", "answered", "claimed"]
        assert "escalated" in decisions
        (answered, _) = (each for each in _events_of_last(rig) if each.decision == "answered")
        assert answered.model == "large"
        assert answered.reason.startswith("large: ")
        assert answered.measured_s > 0


async def test_a_stage_that_fails_goes_up_and_is_reported():
    async with running_rig() as rig:
        await rig.add_model("small")
        await rig.add_model("large")
        await rig.deploy("both", ("small", 0.5), ("large", None))
        broken = Answer("", finish=FinishReason.ERROR, error="engine says no")
        rig.worker(small=broken, large=Answer("right"))
        outcome = await rig.ask("both")
        assert outcome.text() == "right"
        assert "engine says no" in outcome.ends[0].stages[0].error


async def test_a_first_stage_that_never_starts_goes_up():
    async with running_rig() as rig:
        await rig.add_model("small", ready=False)
        await rig.add_model("large")
        await rig.deploy("both", ("small", 0.5), ("large", None))
        rig.worker(large=Answer("right"))
        asking = asyncio.create_task(rig.ask("both"))
        await rig.until(lambda: "small" in rig.router.demand.waiting)
        await _fail_to_start(rig, "small")
        outcome = await asking
        assert outcome.text() == "right"
        assert "bad bytes" in outcome.ends[0].stages[0].error


async def test_a_model_that_never_starts_is_an_error_until_its_replicas_are_gone():
    async with running_rig() as rig:
        await rig.add_model("small", ready=False)
        asking = asyncio.create_task(rig.ask("small"))
        await rig.until(lambda: "small" in rig.router.demand.waiting)
        await _fail_to_start(rig, "small")
        with pytest.raises(Unavailable, match="bad bytes"):
            await asking
        with pytest.raises(Unavailable, match="bad bytes"):
            await rig.ask("small")


async def test_a_small_context_goes_up_and_a_large_prompt_is_refused():
    async with running_rig() as rig:
        await rig.add_model("small", context_tokens=5)
        await rig.add_model("large", context_tokens=50)
        await rig.deploy("both", ("small", 0.5), ("large", None))
        rig.worker(small=Answer("wrong"), large=Answer("right"))
        outcome = await rig.ask("both", "a long prompt")
        assert outcome.text() == "right"
        assert "5 tokens" in outcome.ends[0].stages[0].error
        await rig.until(lambda: not any(rig.queue_server.queues.values()))
        with pytest.raises(InvalidRequest) as caught:
            await rig.ask("both", "x" * 100)
        assert caught.value.code == "context_length_exceeded"
        assert not any(rig.queue_server.queues.values())


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


async def test_a_deadline_ends_the_wait():
    async with running_rig() as rig:
        await rig.add_model("small")
        with pytest.raises(DeadlineExceeded):
            await rig.ask("small", timeout_s=0.05)
        await rig.until(lambda: not any(rig.queue_server.queues.values()))


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


async def _fail_to_start(rig: Rig, model: str) -> None:
    for _ in range(3):
        await rig.set_replica(model, ReplicaState.LOADING)
        await _seen(rig)
        await rig.set_replica(model, ReplicaState.FAILED, "bad bytes")
        await _seen(rig)


async def _seen(rig: Rig) -> None:
    """The router's own follower of the view has had its turn."""
    for _ in range(10):
        await asyncio.sleep(0)


def _events_of_last(rig: Rig):
    (request_id,) = rig.router.service.request_log._events
    return rig.router.service.request_log.events(request_id)
