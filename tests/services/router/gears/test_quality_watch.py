"""What broken promises do in a running router: thresholds, cluster state, other routers, resets."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from gearfall.core.errors import Unavailable
from gearfall.core.gears.drift import Compared
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.gears.gear_records import DriftRecord
from gearfall.core.ids import DeploymentName, ModelName, NodeId, WorkerId
from gearfall.core.records import DeploymentRecord, Stage, WorkerRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from services.router.background import Background
from services.router.gears.gear_board import PinnedGear
from services.router.gears.quality_metrics import QualityMetrics
from services.router.gears.quality_watch import QualityWatch
from tests.gearfall.infra.metric_samples import samples_of
from tests.services.router.rig import Answer, Rig, running_rig

NAME = DeploymentName("chat")
ALARMS = "gearfall_drift_alarms_total"
CASCADE = (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
PROMISE = Promise(0.9, 0.0, 0.1, 2000, 1.0, 1.0, (1.0, 0.3), (0.95,), (1400,))
PLAN = GearPlan(
    "chat", 1, 1.0, "a test", "FLOP", {"small": "", "large": ""},
    (Gear(1e9, CASCADE, PROMISE),),
    (PlacedReplicas("node-a", "small", 1), PlacedReplicas("node-a", "large", 1)),
)  # fmt: skip


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as started:
        for name in ("small", "large"):
            await started.add_model(name)
        worker = WorkerRecord(WorkerId("w"), NodeId("node-a"), "127.0.0.1:1", "cpu", 2**34, 4)
        lease = await started.cluster.grant_lease(60)
        await started.cluster.wait_seen(await started.cluster.put_worker(worker, lease=lease))
        await deploy(started)
        yield started


async def deploy(rig: Rig, version: int = 1) -> None:
    plan = replace(PLAN, version=version)
    record = DeploymentRecord(NAME, CASCADE, shadow_share=0.0)
    await rig.router.catalogue.put_deployment(record, gear_plan=plan_text(plan))
    deployed_unix_s = rig.cluster.view.gear_plans[NAME].deployed_unix_s
    await rig.until(lambda: pinned(rig).deployment == (deployed_unix_s, version))


def pinned(rig: Rig) -> PinnedGear:
    gear = rig.router.quality.pin(NAME)
    assert gear is not None
    return gear


def disagree(
    watch: QualityWatch, gear: PinnedGear, *, below: float = 0.8, least: float = 0.5
) -> None:
    """Compare 120 answers: those below a certainty are not what the last stage says."""
    for number in range(120):
        certainty = least + number % 60 / 60 * (1.0 - least)
        watch.compared(NAME, gear, 0, Compared(certainty, certainty >= below))


async def test_thresholds_are_raised_for_new_requests_and_said_everywhere(rig: Rig, caplog) -> None:
    before = pinned(rig)
    caplog.set_level(logging.WARNING, "services.router.gears.quality_watch")
    disagree(rig.router.quality, before)
    after = pinned(rig)
    (first, last) = after.stages
    assert first.threshold is not None
    assert 0.5 < first.threshold <= 0.8
    assert last == CASCADE[-1]
    assert (before.label, after.label) == ("1/0", "1/0+1")
    assert before.stages == after.planned == CASCADE, "what is admitted keeps its thresholds"
    await rig.until(lambda: bool(rig.cluster.view.drift))
    (record,) = rig.cluster.view.drift.values()
    assert (record.name, record.cascade, record.version) == (NAME, "small:0.5,large", 1)
    assert (record.thresholds, record.times) == ((first.threshold,), 1)
    (said,) = (await rig.router.status.read()).alarms
    assert said.startswith("chat, small:0.5,large: ")
    assert f"threshold raised from 0.5 to {first.threshold:.4g}" in said
    told = rig.router.quality.explain("chat")
    assert {decision for _, decision, _ in told} == {"agreement alarm", "watched"}
    assert [each.message for each in caplog.records] == ["a promise does not hold"]
    rig.worker(small=Answer("hi", logprob=-0.2), large=Answer("no"))
    outcome = await rig.ask("chat")
    assert outcome.ends[0].stages[0].threshold == first.threshold
    shown = rig.router.service.metrics.render(0, {}, {}).decode()
    labels = 'cascade="small:0.5,large",model="chat",promise="agreement",stage="small"'
    assert f"gearfall_drift_alarms_total{{{labels}}} 1.0" in shown
    assert 'gearfall_gear_threshold{cascade="small:0.5,large"' in shown


async def test_evidence_under_other_thresholds_does_not_count(rig: Rig) -> None:
    before = pinned(rig)
    disagree(rig.router.quality, before)
    raised = pinned(rig)
    disagree(rig.router.quality, before)
    assert pinned(rig).stages == raised.stages
    disagree(rig.router.quality, raised, below=0.95)
    again = pinned(rig)
    assert again.tightened == 2
    assert (again.stages[0].threshold or 0) > (raised.stages[0].threshold or 0)


async def another_watch(rig: Rig) -> tuple[QualityWatch, Cluster, Background]:
    """Another router's, over the same cluster state."""
    cluster = Cluster(MemoryState(rig.state_server))
    await cluster.start()
    background = Background()
    metrics = QualityMetrics(CollectorRegistry())
    watch = QualityWatch(cluster, rig.router.gears.pin, background, metrics, clock=time.time)
    background.spawn(watch.run(), "watch")
    return watch, cluster, background


async def test_another_router_heeds_it_and_a_new_one_finds_it(rig: Rig) -> None:
    watch, cluster, background = await another_watch(rig)
    disagree(rig.router.quality, pinned(rig))
    raised = pinned(rig).stages
    await rig.until(lambda: (gear := watch.pin(NAME)) is not None and gear.stages == raised)
    late, late_cluster, late_background = await another_watch(rig)
    gear = late.pin(NAME)
    assert gear is not None
    assert (gear.stages, gear.label) == (raised, "1/0+1")
    assert late.alarms() == rig.router.quality.alarms()
    for each in (background, late_background, cluster, late_cluster):
        await each.stop()


@pytest.mark.parametrize("least", [(0.5, 0.7), (0.7, 0.5)])
async def test_two_routers_that_find_it_agree_on_the_higher_threshold(rig: Rig, least) -> None:
    """Neither has heard of the other when it finds it, and the first one writes last."""
    watch, cluster, background = await another_watch(rig)
    put, held, gate, done = rig.cluster.put_drift, *(asyncio.Event() for _ in range(3))

    async def late(record: DriftRecord) -> int:
        held.set()
        await gate.wait()
        revision = await put(record)
        await rig.cluster.wait_seen(revision)
        done.set()
        return revision

    rig.cluster.put_drift = late  # type: ignore[method-assign]
    gear = pinned(rig)
    disagree(rig.router.quality, gear, least=least[0])
    await held.wait()
    disagree(watch, gear, least=least[1])
    found = [each._own[NAME, "small:0.5,large"].thresholds for each in (rig.router.quality, watch)]
    assert found[0] != found[1]
    await rig.until(lambda: bool(rig.cluster.view.drift))
    gate.set()
    await done.wait()
    await rig.until(lambda: not rig.router.quality._own and not watch._own)
    (record,) = rig.cluster.view.drift.values()
    assert record.thresholds == max(found)
    assert watch.pin(NAME) == pinned(rig)
    for each in (background, cluster):
        await each.stop()


async def test_deploying_a_plan_forgets_it(rig: Rig) -> None:
    disagree(rig.router.quality, pinned(rig))
    await rig.until(lambda: bool(rig.cluster.view.drift))
    await deploy(rig)
    await rig.until(lambda: not rig.cluster.view.drift)
    await rig.until(lambda: pinned(rig).label == "1/0")
    assert not rig.router.quality.alarms()
    disagree(rig.router.quality, pinned(rig))
    await deploy(rig, version=2)
    assert pinned(rig).label == "2/0"
    assert pinned(rig).stages == CASCADE


async def test_a_plan_that_goes_leaves_no_series_of_its_cascades(rig: Rig) -> None:
    """Every plan has other thresholds and so other labels; other deployments keep theirs."""
    metrics = rig.router.quality._metrics
    metrics.decisions.labels("other", "a:0.5,b", "a", "up").inc()
    metrics.shadow.labels(NAME, "small:0.5,large", "small", "agreed").inc()
    rig.worker(small=Answer("yes", logprob=-0.2), large=Answer("no"))
    await rig.ask("chat")
    disagree(rig.router.quality, pinned(rig))
    await rig.until(lambda: bool(rig.cluster.view.drift))
    assert len(cascades_shown(rig)) > 4
    await deploy(rig, version=2)
    await rig.until(lambda: cascades_shown(rig) == {("gearfall_gear_decisions_total", "other")})


def cascades_shown(rig: Rig) -> set[tuple[str, str]]:
    """Name and deployment of all series with a cascade."""
    return {
        (sample.name, sample.labels["model"])
        for metric in rig.router.service.metrics.registry.collect()
        for sample in metric.samples
        if "cascade" in sample.labels and not sample.name.endswith("_created")
    }


async def test_deploying_the_same_plan_again_forgets_what_was_seen(rig: Rig) -> None:
    gear = pinned(rig)
    for _ in range(20):
        rig.router.quality.compared(NAME, gear, 0, Compared(0.9, True))
    assert "20 compared" in rig.router.quality.explain("chat")[0][2]
    await deploy(rig)
    await rig.until(lambda: "not yet used" in rig.router.quality.explain("chat")[0][2])


async def test_what_was_admitted_before_the_same_plan_came_again_is_no_evidence(rig: Rig) -> None:
    before = pinned(rig)
    await deploy(rig)
    after = pinned(rig)
    assert (after.version, after.stages) == (before.version, before.stages)
    disagree(rig.router.quality, before)
    assert pinned(rig).label == "1/0"
    assert not rig.router.quality.alarms()
    assert "not yet used" in rig.router.quality.explain("chat")[0][2]
    disagree(rig.router.quality, after)
    assert pinned(rig).label == "1/0+1"


async def test_deploying_the_same_plan_again_forgets_what_could_not_be_written(rig: Rig) -> None:
    async def refusing(record: DriftRecord) -> int:
        raise Unavailable(f"gone: {record.name}")

    rig.cluster.put_drift = refusing  # type: ignore[method-assign]
    disagree(rig.router.quality, pinned(rig))
    assert pinned(rig).label == "1/0+1"
    await deploy(rig)
    assert pinned(rig).label == "1/0"
    assert not rig.router.quality.alarms()
    await rig.until(lambda: not rig.router.quality._own)


async def test_what_was_found_before_is_void_when_it_is_written_late(rig: Rig) -> None:
    """The write is under way while the same plan is deployed again."""
    put, held, gate = rig.cluster.put_drift, asyncio.Event(), asyncio.Event()

    async def late(record: DriftRecord) -> int:
        held.set()
        await gate.wait()
        return await put(record)

    rig.cluster.put_drift = late  # type: ignore[method-assign]
    disagree(rig.router.quality, pinned(rig))
    await held.wait()
    await deploy(rig)
    gate.set()
    await rig.until(lambda: bool(rig.router.quality._shown))
    assert pinned(rig).label == "1/0"
    assert not cascades_shown(rig)
    assert not rig.router.quality.alarms()
    disagree(rig.router.quality, pinned(rig), least=0.7)
    raised = pinned(rig).stages
    await rig.until(lambda: not rig.router.quality._own)
    (record,) = rig.cluster.view.drift.values()
    assert record.deployed_unix_s == rig.cluster.view.gear_plans[NAME].deployed_unix_s
    assert pinned(rig).stages == raised


async def test_removing_the_deployment_forgets_it(rig: Rig) -> None:
    disagree(rig.router.quality, pinned(rig))
    await rig.until(lambda: bool(rig.cluster.view.drift))
    await rig.router.catalogue.remove_deployment(NAME)
    await rig.until(lambda: not rig.cluster.view.drift)
    await rig.until(lambda: rig.router.quality.pin(NAME) is None)


async def test_a_record_that_does_not_fit_changes_nothing(rig: Rig) -> None:
    at = rig.cluster.view.gear_plans[NAME].deployed_unix_s
    wrongs: tuple[tuple[int, tuple[float, ...], float], ...] = (
        (7, (0.99,), at), (1, (), at), (1, (0.9, 0.9), at), (1, (0.99,), at - 1.0),
    )  # fmt: skip
    for version, thresholds, deployed_unix_s in wrongs:
        record = DriftRecord(
            NAME, "small:0.5,large", version, thresholds, 3, deployed_unix_s=deployed_unix_s
        )
        await rig.cluster.delete_drift(NAME, record.cascade)
        await rig.cluster.wait_seen(await rig.cluster.put_drift(record))
        assert pinned(rig).stages == CASCADE
        assert not rig.router.quality.alarms()
    disagree(rig.router.quality, pinned(rig))
    await rig.until(lambda: not rig.router.quality._own)
    assert pinned(rig).tightened == 1


async def test_what_could_not_be_written_is_heeded_here_and_written_later(rig: Rig) -> None:
    refusals = [Unavailable("gone"), Unavailable("gone")]
    put = rig.cluster.put_drift

    async def refusing(record: DriftRecord) -> int:
        if refusals:
            raise refusals.pop()
        return await put(record)

    rig.cluster.put_drift = refusing  # type: ignore[method-assign]
    disagree(rig.router.quality, pinned(rig))
    assert pinned(rig).tightened == 1
    assert not rig.cluster.view.drift
    await rig.until(lambda: bool(rig.cluster.view.drift))
    assert not refusals


async def test_another_share_of_escalations_is_an_alarm_and_nothing_else(rig: Rig) -> None:
    """All go up, where 30 % were promised."""
    rig.worker(small=Answer("no", logprob=-1.0), large=Answer("yes"))
    await rig.ask("chat", temperature=0.0)
    labels = 'cascade="small:0.5,large",model="chat",outcome="up",stage="small"'
    shown = rig.router.service.metrics.render(0, {}, {}).decode()
    assert f"gearfall_gear_decisions_total{{{labels}}} 1.0" in shown
    (end,) = (await rig.ask("chat", temperature=0.0)).ends
    for _ in range(60):
        rig.router.quality.answered(NAME, pinned(rig), end)
    (said,) = rig.router.quality.alarms()
    assert "went up, promised were 30.0%" in said
    assert pinned(rig).stages == CASCADE


async def test_as_promised_nothing_happens(rig: Rig) -> None:
    for number in range(1000):
        agreed = Compared(0.5 + number % 50 / 100, number % 25 != 0)
        rig.router.quality.compared(NAME, pinned(rig), 0, agreed)
    assert pinned(rig).label == "1/0"
    assert not rig.cluster.view.drift
    shown = samples_of(rig.router.service.metrics.render(0, {}, {}))
    alarms = {key[3]: value for key, value in shown.items() if key[0] == ALARMS}
    assert alarms == {"agreement": 0, "escalation": 0}, "an increase from nothing is none"
    ((_, decision, why),) = rig.router.quality.explain("chat")
    assert decision == "watched"
    assert "96.0% of 1000 compared agreed with large, promised at least 90.6%" in why
