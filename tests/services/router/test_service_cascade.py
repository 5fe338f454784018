"""The router's service where a question goes up a cascade, or its models cannot be had."""

import asyncio

import pytest

from gearfall.core.errors import (
    InvalidRequest,
    Unavailable,
)
from gearfall.core.generation.job import FinishReason
from gearfall.core.records import ReplicaState
from tests.services.router.rig import (
    Answer,
    Rig,
    probability,
    running_rig,
)


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
