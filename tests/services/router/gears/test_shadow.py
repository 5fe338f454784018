"""The shadow share: which answers are compared, when, by whom, and that no client notices."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.generation.job import FinishReason, Priority
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, ReplicaState, Stage
from services.router.answer_desk import AnswerDesk
from services.router.background import Background
from services.router.gears.quality_metrics import CacheMetrics, QualityMetrics
from services.router.gears.shadow import MAX_AT_ONCE, Shadow, is_drawn
from services.router.generation import GenerationRequest, TextPrompt
from services.router.service import RouterLimits
from tests.gearfall.infra.metric_samples import samples_of
from tests.services.router.rig import Answer, Outcome, Rig, running_rig

NAME = DeploymentName("chat")
CASCADE = (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
RECORD = DeploymentRecord(NAME, CASCADE, shadow_share=0.05)
SURE, UNSURE = -0.01, -1.0


def ids(*, drawn: bool = True, count: int = 1) -> list[str]:
    """Request ids that are among the 5 %, or not."""
    found = (
        each for each in map(str, range(10_000)) if is_drawn(each, RECORD, has_plan=False) is drawn
    )
    return [next(found) for _ in range(count)]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    limits = RouterLimits(max_choices=8, stop_grace_s=0.05, entry_check_s=0.02)
    async with running_rig(limits=limits) as started:
        for name in ("small", "large"):
            await started.add_model(name)
        await started.cluster.wait_seen(await started.cluster.put_deployment(RECORD))
        yield started


def outcomes(rig: Rig) -> dict[str, float]:
    metric = rig.router.shadow._metrics.shadow
    return {
        sample.labels["outcome"]: sample.value
        for each in metric.collect()
        for sample in each.samples
        if sample.name.endswith("_total")
    }


async def ask(rig: Rig, request_id: str = "", **fields: object) -> Outcome:
    (drawn,) = ids()
    wanted = {"temperature": 0.0, "request_id": request_id or drawn, "tenant": "t", **fields}
    return await rig.ask("chat", "hi", **wanted)


def test_the_draw_is_by_the_requests_id_alone():
    drawn = [is_drawn(f"r{number}", RECORD, has_plan=False) for number in range(20_000)]
    assert drawn == [is_drawn(f"r{number}", RECORD, has_plan=True) for number in range(20_000)]
    assert 0.045 < sum(drawn) / len(drawn) < 0.055


@pytest.mark.parametrize(
    ("share", "has_plan", "expected"),
    [(None, False, 0.0), (None, True, 0.01), (0.0, True, 0.0), (0.02, False, 0.02)],
)
def test_the_share_is_that_of_the_deployment(share, has_plan, expected):
    record = replace(RECORD, shadow_share=share)
    drawn = sum(is_drawn(f"r{n}", record, has_plan=has_plan) for n in range(20_000))
    assert drawn / 20_000 == pytest.approx(expected, abs=0.003)


async def test_the_reply_is_there_before_the_last_stage_is_asked(rig: Rig) -> None:
    """Nobody runs the large model yet; the client does not wait for it."""
    rig.worker(small=Answer("yes", logprob=SURE))
    outcome = await ask(rig)
    assert outcome.text() == "yes"
    (report,) = outcome.ends[0].stages
    assert outcome.ends[0].usage.total_completion_tokens == report.completion_tokens
    large = rig.worker("worker-b", large=Answer("yes"))
    await rig.until(lambda: outcomes(rig) == {"agreed": 1.0})
    (job,) = large.jobs
    assert (job.priority, job.tenant, job.sampling.temperature) == (Priority.BATCH, "t", 0.0)
    assert job.request_id == ids()[0]
    assert rig.router.service.admission.running_choices == 0
    shown = rig.router.service.metrics.render(0, {}, {}).decode()
    assert 'gearfall_requests_total{model="chat",outcome="finished"} 1.0' in shown
    assert f'gearfall_tokens_total{{kind="completion",model="chat"}} {4.0}' in shown
    assert f'gearfall_shadow_tokens_total{{kind="completion",model="chat"}} {4.0}' in shown
    assert 'stage="large"' not in "".join(
        line for line in shown.splitlines() if line.startswith("gearfall_stage_answers")
    )
    decisions = [each.decision for each in rig.router.service.request_log.events(ids()[0])]
    assert decisions[0] == "compared"


@pytest.mark.parametrize(
    ("large", "expected", "device_s"),
    [
        (Answer("yes", device_s=0.5), "agreed", 2.0),
        (Answer("yes", device_s=0.5, finish=FinishReason.ERROR, error="broken"), "failed", 1.5),
    ],
)
async def test_no_tenant_and_no_request_is_charged_for_it(
    rig: Rig, large, expected, device_s
) -> None:
    """Tokens of half a second: a whole answer's four, or the three before the failure."""
    rig.worker(small=Answer("yes", logprob=SURE, device_s=0.25), large=large)
    end = (await ask(rig)).ends[0]
    await rig.until(lambda: outcomes(rig) == {expected: 1.0})
    now = samples_of(rig.router.service.metrics.render(0, {}, {}).decode())
    charged = {
        key: value
        for key, value in now.items()
        if key[0] in ("gearfall_device_seconds_total", "gearfall_cost_flops_total")
    }
    assert charged == {
        ("gearfall_device_seconds_total", "chat", "small", "t"): 1.0,
        ("gearfall_cost_flops_total", "chat", "small", "t"): end.usage.cost_flops,
    }
    (total,) = rig.router.service.metrics.costs.totals.values()
    assert (total.device_s, total.flops) == (1.0, end.usage.cost_flops)
    assert now["gearfall_shadow_device_seconds_total", "chat"] == device_s
    assert now["gearfall_shadow_cost_flops_total", "chat"] > 0


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [("yes", "yes", "agreed"), ("yes", " yes ", "agreed"), ("yes", "Yes", "disagreed")],
)
async def test_answers_agree_by_their_text(rig: Rig, small, large, expected) -> None:
    rig.worker(small=Answer(small, logprob=SURE), large=Answer(large))
    await ask(rig)
    await rig.until(lambda: outcomes(rig) == {expected: 1.0})


@pytest.mark.parametrize(
    ("fields", "small"),
    [
        ({"request_id": ids(drawn=False)[0]}, SURE),
        ({"temperature": 0.7}, SURE),
        ({"stream_mode": StreamMode.EARLY}, SURE),
        ({}, UNSURE),
    ],
)
async def test_what_is_not_to_be_compared_is_not(rig: Rig, fields, small) -> None:
    """Not drawn, not greedy, decided on its beginning, and not given by a lower stage."""
    worker = rig.worker(small=Answer("yes", logprob=small), large=Answer("yes"))
    await ask(rig, **fields)
    jobs = len(worker.jobs)
    await ask(rig, **(fields | {"request_id": ids(drawn=False)[0]}))
    assert len(worker.jobs) == 2 * jobs
    assert outcomes(rig) == {}


async def test_a_cold_model_is_not_started_for_it(rig: Rig) -> None:
    await rig.set_replica("large", ReplicaState.STARTING)
    rig.worker(small=Answer("yes", logprob=SURE))
    await ask(rig)
    assert outcomes(rig) == {"cold": 1.0}
    assert not rig.router.demand.waiting


async def test_it_gives_way_to_requests_that_wait(rig: Rig) -> None:
    rig.worker(small=Answer("yes", logprob=SURE))
    waiting = await rig.router.service.start(
        replace(_request("large"), request_id="waits", priority=Priority.BATCH)
    )
    await ask(rig)
    assert outcomes(rig) == {"busy": 1.0}
    waiting.close()


async def test_it_is_left_out_when_the_router_is_half_full(rig: Rig) -> None:
    worker = rig.worker(small=Answer("yes", logprob=SURE))
    held = await rig.router.service.start(replace(_request("small"), n=5, request_id="many"))
    await rig.until(lambda: len(held.ends) == 5)
    full = await rig.router.service.start(replace(_request("large"), n=5, request_id="full"))
    rig.worker("worker-b", large=Answer("yes")).hold_at = 0
    await rig.until(lambda: not rig.router.jobs.waiting(ModelName("small")))
    await ask(rig)
    assert outcomes(rig) == {"busy": 1.0}
    assert worker.jobs
    full.close()


async def test_few_run_at_once(rig: Rig) -> None:
    """Wired anew without regard to what waits, as nobody runs the large model at first."""
    metrics, background = QualityMetrics(CollectorRegistry()), Background()
    router = rig.router
    router.shadow = Shadow(
        background, metrics, hindrance=lambda _: "", on_compared=router.quality.compared
    )
    router.service.desk = AnswerDesk(
        router.cache, router.quality, router.shadow, CacheMetrics(CollectorRegistry())
    )
    rig.worker(small=Answer("yes", logprob=SURE))
    for request_id in ids(count=MAX_AT_ONCE + 3):
        await ask(rig, request_id=request_id)
    assert outcomes(rig) == {"busy": 3.0}
    assert router.jobs.waiting(ModelName("large")) == MAX_AT_ONCE
    rig.worker("worker-b", large=Answer("yes"))
    await rig.until(lambda: outcomes(rig) == {"busy": 3.0, "agreed": 2.0})
    await ask(rig)
    await rig.until(lambda: outcomes(rig) == {"busy": 3.0, "agreed": 3.0})
    await background.stop()


async def test_a_last_stage_that_fails_is_counted_and_nobody_hears_of_it(rig: Rig) -> None:
    broken = Answer("no", finish=FinishReason.ERROR, error="broken")
    rig.worker(small=Answer("yes", logprob=SURE), large=broken)
    assert (await ask(rig)).text() == "yes"
    await rig.until(lambda: outcomes(rig) == {"failed": 1.0})


async def test_with_a_plan_it_is_evidence_and_raises_thresholds_in_the_end(rig: Rig) -> None:
    """The large model says something else throughout: nothing of the small one is trusted."""
    promise = Promise(0.9, 0.0, 0.1, 2000, 1.0, 1.0, (1.0, 0.3), (0.95,), (1400,))
    plan = GearPlan(
        "chat", 1, 1.0, "a test", "FLOP", {"small": "", "large": ""},
        (Gear(1e9, CASCADE, promise),),
        (PlacedReplicas("node-a", "small", 1), PlacedReplicas("node-a", "large", 1)),
        agreement_rule="normalised",
    )  # fmt: skip
    await rig.router.catalogue.put_deployment(RECORD, gear_plan=plan_text(plan))
    await rig.until(lambda: rig.router.quality.pin(NAME) is not None)
    worker = rig.worker(small=Answer("yes", logprob=SURE), large=Answer("Yes."))
    first, *others = ids(count=25)
    await ask(rig, request_id=first)
    await rig.until(lambda: outcomes(rig) == {"agreed": 1.0})
    worker.answers["large"] = Answer("no")
    for number, request_id in enumerate(others):
        if (gear := rig.router.quality.pin(NAME)) is not None and gear.tightened:
            break
        await ask(rig, request_id=request_id)
        await until_disagreed(rig, number + 1)
    gear = rig.router.quality.pin(NAME)
    assert gear is not None
    assert gear.tightened
    assert (gear.stages[0].threshold or 0) > 0.9
    assert number < 20


async def until_disagreed(rig: Rig, times: int) -> None:
    await rig.until(lambda: outcomes(rig).get("disagreed", 0.0) == times)


async def test_a_share_with_nothing_to_compare_is_refused(rig: Rig) -> None:
    alone = replace(RECORD, stages=(Stage(ModelName("small")),))
    with pytest.raises(InvalidRequest, match="no other answer to compare with"):
        await rig.router.catalogue.put_deployment(alone)
    await rig.router.catalogue.put_deployment(replace(alone, shadow_share=0.0))


def _request(model: str) -> GenerationRequest:
    return GenerationRequest(model, (TextPrompt("hi"),), temperature=0.0)
