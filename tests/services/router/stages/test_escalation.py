"""What a router does with an uncertain answer: up, or given with its flag, and what that costs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from gearfall.client import AsyncClient, TextDelta
from gearfall.client.values import Event
from gearfall.core.certainty.escalation import (
    AtDeadline,
    AtOverload,
    Degraded,
    EscalationPolicy,
    WhileLoading,
)
from gearfall.core.certainty.escalation_cap import CUT, PERIOD_S, CapState
from gearfall.core.errors import DeadlineExceeded, GearfallError, Internal, Unavailable
from gearfall.core.generation.job import Job
from gearfall.core.generation.streaming import Streaming
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.model_pace import Timing
from gearfall.core.records import DemandRecord, ReplicaState
from tests.gearfall.infra.metric_samples import Samples, samples_of
from tests.services.router.rig import Answer, Outcome, Rig, running_rig
from tests.services.router.stages.test_drafts_go_up import VerifyingAnswer

UNSURE, SURE = Answer("small", logprob=-1.0), Answer("small", logprob=-0.001)
LARGE = ModelName("large")
ANSWER = EscalationPolicy(while_loading=WhileLoading.ANSWER)
WHOLE_DRAFTS = Streaming(finishes_drafts=True)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """A router that knows a small model that is ready and a large one that is cold."""
    async with running_rig() as started:
        await started.add_model("small", parameters=10)
        await started.add_model("large", parameters=1000, ready=False)
        yield started


async def deploy(rig: Rig, policy: EscalationPolicy, **fields: Any) -> None:
    await rig.deploy(
        "both",
        ("small", 0.5),
        ("large", None),
        streaming=WHOLE_DRAFTS,
        escalation=policy,
        **fields,
    )


def learn(rig: Rig, model: str, seconds: float) -> None:
    """Make the router believe that `model` takes so long."""
    key = DeploymentName("both"), ModelName(model)
    rig.router.service.prospects.learn(key, Timing(3, seconds, 0, 0.0), 1)


def demand(rig: Rig) -> list[DemandRecord]:
    """What the scheduler is told about the large model."""
    return [each for (model, _), each in rig.cluster.view.demand.items() if model == LARGE]


def told(outcome: Outcome) -> tuple[str, Degraded | None]:
    (end,) = outcome.ends
    assert outcome.text() in ("", end.model)
    return end.model, end.degraded


def metrics(rig: Rig) -> Samples:
    return samples_of(rig.router.service.metrics.render(0, {}, {}).decode())


async def seen(rig: Rig, holds: Callable[[], bool]) -> None:
    """Return once the view shows it: `Rig.until` gives writes on their way no time."""
    async with asyncio.timeout(5):
        async for _ in rig.cluster.changes():
            if holds():
                return


async def test_the_small_model_answers_while_the_large_one_loads_and_has_it_started(rig: Rig):
    await deploy(rig, ANSWER)
    rig.worker(small=UNSURE)
    for _ in range(3):
        assert told(await rig.ask("both")) == ("small", Degraded.LOADING)
    await seen(rig, lambda: bool(demand(rig)))
    assert [each.waiting_jobs for each in demand(rig)] == [1], "once, however many asked"
    assert not rig.queue_server.queues.get(LARGE), "nobody waits for it"
    await rig.set_replica("large", ReplicaState.READY)
    await seen(rig, lambda: not demand(rig))
    rig.worker("worker-b", large=Answer("large"))
    outcome = await rig.ask("both")
    assert told(outcome) == ("large", None)
    assert [each.model for each in outcome.ends[0].stages] == ["small", "large"]


async def test_a_certain_answer_starts_nothing(rig: Rig):
    await deploy(rig, ANSWER)
    rig.worker(small=SURE)
    assert told(await rig.ask("both")) == ("small", None)
    assert not demand(rig)
    assert rig.router.service.prospects._charged == set()


async def test_by_default_the_large_model_is_waited_for(rig: Rig):
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE)
    asking = asyncio.create_task(rig.ask("both"))
    await seen(rig, lambda: bool(demand(rig)))
    await rig.set_replica("large", ReplicaState.READY)
    rig.worker("worker-b", large=Answer("large"))
    assert told(await asking) == ("large", None)


async def test_the_request_that_causes_a_start_is_charged_for_it(rig: Rig):
    await deploy(rig, ANSWER)
    rig.worker(small=UNSURE)
    first, second = (await rig.ask("both")).ends[0], (await rig.ask("both")).ends[0]
    expected_s = rig.router.service.expected_start_s(LARGE)
    assert first.usage.start_s == pytest.approx(expected_s)
    assert expected_s > 0
    assert second.usage.start_s == 0.0
    await rig.set_replica("large", ReplicaState.READY)
    rig.worker("worker-b", large=Answer("large"))
    assert (await rig.ask("both")).ends[0].usage.start_s == 0.0


async def test_no_time_for_the_large_model_gives_the_small_ones_answer(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE, large=Answer("large"))
    learn(rig, "large", 30.0)
    outcome = await rig.ask("both", timeout_s=10.0)
    assert told(outcome) == ("small", Degraded.DEADLINE)
    assert outcome.ends[0].finish.value == "stop", "the reason to stop is the answer's own"
    assert told(await rig.ask("both", timeout_s=60.0)) == ("large", None)


async def test_the_pace_of_answers_that_verify_a_draft_is_learned_too(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE, large=VerifyingAnswer("smart"))
    (end,) = (await rig.ask("both")).ends
    assert end.stages[1].accepted_draft_tokens == 3
    key, prospects = (DeploymentName("both"), LARGE), rig.router.service.prospects
    assert prospects.usual_tokens(key, 50) == 6
    assert 0 < prospects._paces[LARGE].answer_s(3, 6) <= end.stages[1].duration_s


async def test_a_deployment_that_rather_fails_asks_the_large_model_all_the_same(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy(at_deadline=AtDeadline.FAIL))
    rig.worker(small=UNSURE, large=Answer("large"))
    learn(rig, "large", 30.0)
    assert told(await rig.ask("both", timeout_s=10.0)) == ("large", None)


async def test_what_does_not_fit_the_deadline_is_left_out(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE, large=Answer("large"))
    learn(rig, "small", 8.0)
    learn(rig, "large", 8.0)
    outcome = await rig.ask("both", timeout_s=10.0, request_id="mine")
    assert told(outcome) == ("large", None)
    assert [each.model for each in outcome.ends[0].stages] == ["large"], "straight to it"
    events = rig.router.service.request_log.events(
        next(reversed(rig.router.service.request_log._events))
    )
    assert "skipped" in [event.decision for event in events]
    both = await rig.ask("both", timeout_s=60.0)
    assert [each.model for each in both.ends[0].stages] == ["small", "large"]


async def test_a_stage_that_is_late_leaves_the_lower_answer(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE)
    outcome = await rig.ask("both", timeout_s=1.0)
    assert told(outcome) == ("small", Degraded.DEADLINE)
    small, large = outcome.ends[0].stages
    assert small.is_accepted
    assert not large.is_accepted
    assert "deadline" in large.error


def refuse_jobs(rig: Rig, model: str, error: GearfallError) -> None:
    """Make the queue of `model` raise in place of taking jobs."""
    append = rig.queue.append

    async def refuse(job: Job) -> str:
        if job.model == model:
            raise error
        return await append(job)

    rig.queue.append = refuse  # type: ignore[method-assign]


async def test_a_queue_that_stays_down_leaves_the_lower_answer(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE)
    refuse_jobs(rig, "large", Unavailable("no queue"))
    assert told(await rig.ask("both", timeout_s=1.0)) == ("small", Degraded.DEADLINE)
    assert len(rig.router.jobs) == 0


async def test_a_stage_whose_job_is_refused_has_failed(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(large=Answer("large"))
    refuse_jobs(rig, "small", Internal("no room for it"))
    outcome = await rig.ask("both")
    assert told(outcome) == ("large", None)
    assert "no room for it" in outcome.ends[0].stages[0].error


async def read(events: AsyncIterator[Event], seen: list[str]) -> None:
    async for event in events:
        seen += [event.text] if isinstance(event, TextDelta) else []


@pytest.mark.parametrize("is_whole", [True, False])
async def test_text_that_a_client_saw_of_a_late_stage_is_not_taken_back(rig: Rig, is_whole: bool):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(small=UNSURE)
    rig.worker("worker-b", large=Answer("large")).hold_at = 3
    async with AsyncClient(rig.router.grpc_address) as client:
        if is_whole:
            (choice,) = (await client.generate("both", "hi", timeout_s=1.0)).choices
            assert (choice.text, choice.model, choice.degraded) == (
                "small",
                "small",
                Degraded.DEADLINE,
            )
        else:
            seen: list[str] = []
            with pytest.raises(DeadlineExceeded):
                await read(client.stream("both", "hi", timeout_s=1.0), seen)
            assert "".join(seen) == "lar"


async def test_a_late_stage_is_an_error_where_the_policy_says_so(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy(at_deadline=AtDeadline.FAIL))
    rig.worker(small=UNSURE)
    with pytest.raises(DeadlineExceeded):
        await rig.ask("both", timeout_s=1.0)


async def test_a_long_queue_keeps_some_answers_down_and_lets_some_up(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy(at_overload=AtOverload.ANSWER, queue_target_s=0.01))
    rig.worker(small=UNSURE)
    first = asyncio.create_task(rig.ask("both"))
    board, caps = rig.router.demand, rig.router.service.prospects._caps
    await rig.until(lambda: board.oldest_wait_s(LARGE, is_batch=False) > 0.01)
    # As if the last look at the queue was some periods ago.
    key = DeploymentName("both"), LARGE
    caps[key] = CapState(share=0.5, credit=0.0, changed_s=caps[key].changed_s - 10 * PERIOD_S)
    asking = [asyncio.create_task(rig.ask("both")) for _ in range(12)]

    def ended() -> list[Outcome]:
        return [each.result() for each in asking if each.done()]

    await rig.until(lambda: len(ended()) + board.waiting.get(LARGE, 0) == 13)
    assert rig.router.service.prospects.shares() == {key: 0.5 * CUT}
    assert metrics(rig)["gearfall_escalation_share", "both", "large"] == 0.5 * CUT
    assert {told(each) for each in ended()} == {("small", Degraded.OVERLOAD)}
    assert board.waiting[LARGE] == 1 + int(12 * 0.5 * CUT), "the first one, and the share"
    rig.worker("worker-b", large=Answer("large"))
    outcomes = [await each for each in (first, *asking)]
    assert [told(each) for each in outcomes].count(("large", None)) == 5


async def test_nothing_is_held_back_without_the_policy(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy(queue_target_s=0.01))
    rig.worker(small=UNSURE)
    asking = [asyncio.create_task(rig.ask("both")) for _ in range(5)]
    await rig.until(lambda: rig.router.demand.oldest_wait_s(LARGE, is_batch=False) > 0.01)
    rig.worker("worker-b", large=Answer("large"))
    assert {told(await each) for each in asking} == {("large", None)}
    assert not rig.router.service.prospects.shares()


async def test_falling_certainty_hints_at_the_next_stage(rig: Rig):
    await deploy(rig, EscalationPolicy(), certainty="mean_token_probability")
    worker = rig.worker(small=Answer("a long answer", logprob=-1.0))
    worker.hold_at = 6
    asking = asyncio.create_task(rig.ask("both"))
    await worker.held.wait()
    await seen(rig, lambda: bool(demand(rig)))
    (record,) = demand(rig)
    assert (record.waiting_jobs, record.hinted_jobs) == (0, 1), "before anybody waits for it"
    worker.gate.set()
    await seen(rig, lambda: any(each.waiting_jobs for each in demand(rig)))
    asking.cancel()


async def test_a_draft_that_stays_certain_hints_at_nothing(rig: Rig):
    await deploy(rig, EscalationPolicy(), certainty="mean_token_probability")
    worker = rig.worker(small=Answer("a long answer", logprob=-0.01))
    worker.hold_at = 10
    asking = asyncio.create_task(rig.ask("both"))
    await worker.held.wait()
    worker.gate.set()
    assert (await asking).ends[0].degraded is None
    assert not demand(rig)


async def test_device_seconds_of_all_stages_add_up_and_show_in_the_metrics(rig: Rig):
    await rig.set_replica("large", ReplicaState.READY)
    await deploy(rig, EscalationPolicy())
    rig.worker(
        small=Answer("small", logprob=-1.0, device_s=0.25), large=Answer("large", device_s=2.0)
    )
    (end,) = (await rig.ask("both", tenant="team")).ends
    assert [each.device_s for each in end.stages] == [6 * 0.25, 6 * 2.0]
    assert end.usage.device_s == 6 * 2.25
    now = metrics(rig)
    assert now["gearfall_device_seconds_total", "both", "small", "team"] == 6 * 0.25
    assert now["gearfall_device_seconds_total", "both", "large", "team"] == 6 * 2.0
    flops = now["gearfall_cost_flops_total", "both", "large", "team"]
    assert flops == end.stages[1].cost_flops > 0


async def test_what_a_cancelled_request_took_counts_all_the_same(rig: Rig):
    await deploy(rig, EscalationPolicy())
    worker = rig.worker(small=Answer("small", device_s=0.25))
    worker.hold_at = 4
    asking = asyncio.create_task(rig.ask("both", request_id="mine"))
    await worker.held.wait()
    log = rig.router.jobs._jobs[worker.jobs[0].job_id].log
    await rig.until(lambda: len(log.token_ids) == 4)
    rig.router.service.cancel("mine")
    await asking
    assert metrics(rig)["gearfall_device_seconds_total", "both", "small", ""] == 4 * 0.25


async def test_degraded_answers_and_the_starts_they_cause_are_counted(rig: Rig):
    await deploy(rig, ANSWER)
    rig.worker(small=UNSURE)
    (end,) = (await rig.ask("both")).ends
    await rig.ask("both")
    now = metrics(rig)
    assert now["gearfall_degraded_answers_total", "both", "loading"] == 2
    assert now["gearfall_caused_start_seconds_total", "both", ""] == end.usage.start_s > 0
    (costs,) = (await rig.router.status.read()).costs
    assert (costs.name, costs.degraded_answers, costs.start_s) == ("both", 2, end.usage.start_s)
    assert costs.cost_flops == 2 * end.usage.cost_flops
