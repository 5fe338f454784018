"""Answers that are given again: what hits, what never may, and that nobody sees another one's."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.escalation import Degraded, EscalationPolicy, WhileLoading
from gearfall.core.errors import DeadlineExceeded, Internal
from gearfall.core.gears.gear_plan import Promise
from gearfall.core.gears.gear_records import GearPlanRecord
from gearfall.core.generation.job import FinishReason, Priority
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from services.router.answer_record import (
    KeptAnswer,
    KeptChoice,
    answer_from_bytes,
    answer_to_bytes,
)
from services.router.gears.gear_board import PinnedGear
from services.router.generation import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    TextPrompt,
    TokenText,
)
from tests.services.router.char_models import model_record
from tests.services.router.rig import Answer, Outcome, Rig, ScriptedWorker, running_rig

NAME = DeploymentName("chat")
GREEDY = {"temperature": 0.0}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as started:
        for name in ("small", "large"):
            await started.add_model(name)
        await deploy(started)
        yield started
        started.router.cache.check()


async def deploy(rig: Rig, cache_bytes: int = 1 << 20, **changes: object) -> None:
    record = DeploymentRecord(
        NAME, (Stage(ModelName("small"), 0.5), Stage(ModelName("large"))), cache_bytes=cache_bytes
    )
    changed = replace(record, **changes)  # type: ignore[arg-type]
    await rig.cluster.wait_seen(await rig.cluster.put_deployment(changed))


def kept(rig: Rig) -> int:
    _, answers, _ = rig.router.cache.sizes().get(NAME, (0, 0, 0))
    return answers


async def test_the_same_request_is_answered_without_a_job(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    first = await rig.ask("chat", "hi", **GREEDY)
    again = await rig.ask("chat", "hi", **GREEDY, priority=Priority.BATCH, request_id="mine")
    assert len(worker.jobs) == 1
    assert again.text() == first.text() == "hello"
    (one, other) = (*first.ends, *again.ends)
    assert (other.finish, other.model, other.degraded) == (one.finish, "small", None)
    assert other.usage.prompt_tokens == one.usage.prompt_tokens == other.usage.cached_tokens
    assert other.usage.completion_tokens == one.usage.completion_tokens
    assert (other.usage.total_prompt_tokens, other.usage.cost_flops) == (0, 0.0)
    assert other.stages == ()
    assert rig.router.service.admission.running_choices == 0
    told = [each.decision for each in rig.router.service.request_log.events("mine")]
    assert told == ["finished", "given again", "admitted"]
    rig.router.service.desk.show()
    shown = rig.router.service.metrics.render(0, {}, {}).decode()
    assert 'gearfall_answer_cache_requests_total{model="chat",outcome="hit"} 1.0' in shown
    assert 'gearfall_answer_cache_answers{model="chat"} 1.0' in shown
    spared = f'gearfall_answer_cache_spared_flops_total{{model="chat"}} {one.usage.cost_flops}'
    assert spared in shown


CHANGES: tuple[tuple[dict[str, object], bool], ...] = (
    ({}, True),
    ({"timeout_s": 5.0}, True),
    ({"is_whole": True}, True),
    ({"seed": 3}, True),
    ({"top_p": 0.5}, True),
    ({"tenant": "other"}, False),
    ({"max_tokens": 3}, False),
    ({"stop": ("l",)}, False),
    ({"logprobs": True}, False),
    ({"n": 2}, False),
    ({"ignore_eos": True}, False),
    ({"temperature": 0.5}, False),
    ({"temperature": 0.5, "seed": 1}, False),
)


async def test_only_what_asks_for_the_same_hits(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    for number, (change, hits) in enumerate(CHANGES):
        await rig.ask("chat", f"hi {number}", **GREEDY)
        before = len(worker.jobs)
        await rig.ask("chat", f"hi {number}", **(GREEDY | change))
        assert (len(worker.jobs) == before) is hits, change


async def test_a_draw_is_kept_for_its_seed_alone(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    for seed in (1, 1, 2, None, None):
        await rig.ask("chat", "hi", temperature=0.7, seed=seed)
    assert len(worker.jobs) == 4
    assert kept(rig) == 2


async def test_off_is_off(rig: Rig) -> None:
    await deploy(rig, cache_bytes=0)
    worker = rig.worker(small=Answer("hello"))
    for _ in range(2):
        await rig.ask("chat", "hi", **GREEDY)
        await rig.ask("small", "hi", **GREEDY)
    assert len(worker.jobs) == 4
    assert not rig.router.cache.sizes()


async def test_a_model_that_is_registered_anew_answers_anew(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    await rig.ask("chat", "hi", **GREEDY)
    other = replace(model_record("large"), digest="other bytes")
    await rig.cluster.wait_seen(await rig.cluster.put_model(other))
    await rig.until(lambda: kept(rig) == 0)
    await rig.ask("chat", "hi", **GREEDY)
    assert len(worker.jobs) == 2


async def test_an_answer_of_bytes_that_changed_meanwhile_is_not_kept(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    asking = asyncio.create_task(rig.ask("chat", "hi", **GREEDY))
    await worker.held.wait()
    other = replace(model_record("small"), digest="other bytes")
    await rig.cluster.wait_seen(await rig.cluster.put_model(other))
    worker.gate.set()
    assert (await asking).text() == "hello"
    assert kept(rig) == 0


async def test_other_thresholds_are_another_cascade(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    await rig.ask("chat", "hi", **GREEDY)
    await deploy(rig, stages=(Stage(ModelName("small"), 0.4), Stage(ModelName("large"))))
    await rig.ask("chat", "hi", **GREEDY)
    assert len(worker.jobs) == 2


async def test_another_plan_of_the_same_version_answers_anew(rig: Rig) -> None:
    """How certain the small model is may be measured otherwise; the stages look the same."""
    rig.worker(small=Answer("hello"))
    one, other = (GearPlanRecord(NAME, 1, content) for content in ("one", "other"))
    await rig.cluster.wait_seen(await rig.cluster.put_gear_plan(one))
    await rig.ask("chat", "hi", **GREEDY)
    await rig.cluster.wait_seen(await rig.cluster.put_gear_plan(one))
    await rig.ask("chat", "ho", **GREEDY)
    assert kept(rig) == 2
    await rig.cluster.put_gear_plan(other)
    await rig.until(lambda: kept(rig) == 0)


async def test_the_same_plan_deployed_again_answers_anew(rig: Rig) -> None:
    """What an older deployment of it was asked may come to its end only now."""
    view, stages = rig.cluster.view, (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
    promise = Promise(0.9, 0.9, 0.05, 100, 1.0, 1.0, (1.0, 0.2))
    gear = PinnedGear(1, 0, stages, "min_margin", {}, promise, "", stages, deployed_unix_s=1.0)
    request = GenerationRequest("chat", (TextPrompt("hi"),), temperature=0.0)
    keys = [
        ticket.key
        for each in (gear, replace(gear, index=1), replace(gear, deployed_unix_s=2.0))
        if (ticket := rig.router.cache.ticket(request, view.deployments[NAME], each)) is not None
    ]
    assert keys[0] == keys[1] != keys[2]


async def test_a_deployment_that_goes_takes_its_answers_along(rig: Rig) -> None:
    rig.worker(small=Answer("hello"))
    await rig.ask("chat", "hi", **GREEDY)
    assert kept(rig) == 1
    await rig.cluster.delete_deployment(NAME)
    await rig.until(lambda: not rig.router.cache.sizes())


async def test_errors_and_cancelled_answers_are_not_kept(rig: Rig) -> None:
    broken = Answer("no", finish=FinishReason.ERROR, error="broken")
    worker = rig.worker(small=broken, large=broken)
    for _ in range(2):
        with pytest.raises(Internal):
            await rig.ask("chat", "hi", **GREEDY)
    assert len(worker.jobs) == 4
    worker.answers["small"] = Answer("hello")
    worker.hold_at = 2
    asking = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, request_id="mine"))
    await worker.held.wait()
    rig.router.service.cancel("mine")
    assert (await asking).ends[0].finish is FinishReason.CANCELLED
    assert kept(rig) == 0


async def test_a_degraded_answer_is_not_kept(rig: Rig) -> None:
    """The small one was not certain, and the large one had no replica: once it has, it is asked."""
    await deploy(rig, escalation=EscalationPolicy(while_loading=WhileLoading.ANSWER))
    await rig.set_replica("large", ReplicaState.STARTING)
    rig.worker(small=Answer("perhaps", logprob=-1.0), large=Answer("surely"))
    outcome = await rig.ask("chat", "hi", **GREEDY)
    assert (outcome.text(), outcome.ends[0].degraded) == ("perhaps", Degraded.LOADING)
    assert kept(rig) == 0
    await rig.set_replica("large", ReplicaState.READY)
    assert (await rig.ask("chat", "hi", **GREEDY)).text() == "surely"
    assert kept(rig) == 1


async def test_requests_at_once_are_computed_once(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    first = asyncio.create_task(rig.ask("chat", "hi", **GREEDY))
    await worker.held.wait()
    others = [asyncio.create_task(rig.ask("chat", "hi", **GREEDY)) for _ in range(3)]
    await rig.until(lambda: rig.router.service.running_requests == 4)
    worker.gate.set()
    outcomes = await asyncio.gather(first, *others)
    assert [each.text() for each in outcomes] == ["hello"] * 4
    assert len(worker.jobs) == 1
    assert [each.ends[0].usage.cost_flops > 0 for each in outcomes] == [True, False, False, False]


async def hold_equal_requests(rig: Rig, worker: ScriptedWorker) -> list[asyncio.Task[Outcome]]:
    """Start four at once: `worker` holds the job of the first, the others wait for it."""
    worker.hold_at = 2
    first = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, request_id="first"))
    await worker.held.wait()
    others = [asyncio.create_task(rig.ask("chat", "hi", **GREEDY)) for _ in range(3)]
    await rig.until(lambda: rig.router.service.running_requests == 4)
    assert len(rig.router.jobs) == 1
    return [first, *others]


async def test_who_waits_goes_its_own_way_when_the_other_is_cancelled(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    first, *others = await hold_equal_requests(rig, worker)
    worker.hold_at = None
    rig.router.service.cancel("first")
    assert (await first).ends[0].finish is FinishReason.CANCELLED
    assert [(await each).text() for each in others] == ["hello"] * 3
    assert len(worker.jobs) == 4
    assert kept(rig) == 1


async def test_answers_that_cant_be_kept_are_not_computed_one_after_another(rig: Rig) -> None:
    await deploy(rig, escalation=EscalationPolicy(while_loading=WhileLoading.ANSWER))
    await rig.set_replica("large", ReplicaState.STARTING)
    worker = rig.worker(small=Answer("perhaps", logprob=-1.0))
    first, *others = await hold_equal_requests(rig, worker)
    gate, worker.gate = worker.gate, asyncio.Event()
    gate.set()
    assert (await first).ends[0].degraded is Degraded.LOADING
    await rig.until(lambda: len(rig.router.jobs) == 3)
    newcomer = asyncio.create_task(rig.ask("chat", "hi", **GREEDY))
    await rig.until(lambda: rig.router.service.running_requests == 4)
    assert len(rig.router.jobs) == 3, "it waits for one of them"
    worker.gate.set()
    outcomes = [await each for each in (*others, newcomer)]
    assert [each.ends[0].degraded for each in outcomes] == [Degraded.LOADING] * 4


async def test_who_has_less_time_does_not_wait_for_who_has_more(rig: Rig) -> None:
    """It may have an answer of a lower stage to give at its own deadline."""
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    first = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, timeout_s=300.0))
    await worker.held.wait()
    second = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, timeout_s=60.0))
    await rig.until(lambda: len(rig.router.jobs) == 2)
    third = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, timeout_s=300.0))
    await rig.until(lambda: rig.router.service.running_requests == 3)
    worker.gate.set()
    assert [(await each).text() for each in (first, second, third)] == ["hello"] * 3
    assert len(worker.jobs) == 2, "the third waited for the first"


async def test_who_goes_its_own_way_keeps_its_own_deadline(rig: Rig) -> None:
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    first = asyncio.create_task(rig.ask("chat", "hi", **GREEDY))
    await worker.held.wait()
    with pytest.raises(DeadlineExceeded):
        await rig.ask("chat", "hi", **GREEDY, timeout_s=0.05)
    worker.gate.set()
    assert (await first).text() == "hello"


async def test_interactive_requests_do_not_wait_for_batch_ones(rig: Rig) -> None:
    slow = rig.worker(small=Answer("hello"))
    slow.hold_at = 2
    batch = asyncio.create_task(rig.ask("chat", "hi", **GREEDY, priority=Priority.BATCH))
    await slow.held.wait()
    rig.worker("worker-b", small=Answer("hello"))
    assert (await rig.ask("chat", "hi", **GREEDY)).text() == "hello"
    slow.gate.set()
    assert (await batch).text() == "hello"


async def test_memory_is_kept_within_what_was_given(rig: Rig) -> None:
    await deploy(rig, cache_bytes=1 << 16)
    rig.worker(small=Answer("hello"))
    for number in range(120):
        await rig.ask("chat", f"{number}", **GREEDY, tenant=f"tenant {number % 2}")
    used, answers, evictions = rig.router.cache.sizes()[NAME]
    assert used <= 1 << 16
    assert 0 < answers < 120
    assert answers + evictions == 120


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TOKENS = st.builds(
    TokenText, st.integers(0, 2**31), TEXTS, st.binary(max_size=4), st.floats(-99, 0), st.just(3)
)


@given(
    st.lists(
        st.builds(
            KeptChoice, st.integers(0, 9), TEXTS, st.lists(TOKENS, max_size=3).map(tuple),
            st.integers(0, 99), st.sampled_from(FinishReason), TEXTS, st.integers(0, 9),
            st.integers(0, 9),
        ),
        max_size=3,
    ),
    st.floats(0, 1e18),
)  # fmt: skip
def test_an_answer_is_read_as_it_was_written(choices, cost):
    answer = KeptAnswer(tuple(choices), cost)
    assert answer_from_bytes(answer_to_bytes(answer)) == answer


async def test_prompts_of_different_kinds_never_meet(rig: Rig) -> None:
    """A conversation that is written out as some text is not that text."""
    cache, view = rig.router.cache, rig.cluster.view
    deployment = view.deployments[NAME]
    prompts = (
        TextPrompt("hi"),
        ChatPrompt((ChatMessage("user", "hi"),)),
        ChatPrompt((ChatMessage("use", "rhi"),)),
        ChatPrompt((ChatMessage("user", "h"), ChatMessage("user", "i"))),
    )
    requests = [GenerationRequest("chat", (each,), temperature=0.0) for each in prompts]
    tickets = [cache.ticket(each, deployment, None) for each in requests]
    assert len({each.key for each in tickets if each is not None}) == len(prompts)
