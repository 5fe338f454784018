"""Gears in a running router: pinned at admission, shifted by load and by other routers' votes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import (
    Gear,
    GearPlan,
    PlacedReplicas,
    Promise,
    Variant,
    plan_text,
)
from gearfall.core.gears.gear_records import GearVoteRecord
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.ids import DeploymentName, ModelName, NodeId, RouterId, WorkerId
from gearfall.core.records import DeploymentRecord, Stage, WorkerRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import key_of
from services.router.gears.gear_board import TYPICAL_ANSWER_TOKENS
from services.router.jobs.backlog import Backlog
from tests.services.router.rig import Answer, Rig, probability, running_rig

NAME = DeploymentName("chat")
SMALL, LARGE = ModelName("small"), ModelName("large")
CASCADE = (Stage(SMALL, 0.5), Stage(LARGE))
ALONE = (Stage(SMALL),)
LOW, HIGH = -1.0, -0.01
"""Log-probabilities of each token that are below and above the threshold."""


def gear(stages=CASCADE, max_load=50.0) -> Gear:
    shares = (1.0, 0.2)[: len(stages)]
    return Gear(max_load, stages, Promise(0.9, 0.0, 0.1, 0, 1.0, 1.0, shares))


PLAN = GearPlan(
    "chat", 1, 1.0, "a test", "FLOP", {"small": "", "large": ""},
    (gear(), gear(ALONE, 1e6)),
    (PlacedReplicas("node-a", "small", 1), PlacedReplicas("node-b", "large", 1)),
    variants=(Variant("node-b", (gear(ALONE),), (PlacedReplicas("node-a", "small", 1),)),),
)  # fmt: skip


async def put_worker(rig: Rig, node: str) -> None:
    record = WorkerRecord(WorkerId(f"on-{node}"), NodeId(node), "127.0.0.1:1", "cpu", 2**34, 4)
    lease = await rig.cluster.grant_lease(60)
    await rig.cluster.wait_seen(await rig.cluster.put_worker(record, lease=lease))


async def deploy(rig: Rig, plan: GearPlan, version: int | None = None) -> None:
    """Put the deployment by the router's door and wait until the board follows it."""
    plan = replace(plan, version=version or plan.version)
    record = DeploymentRecord(NAME, plan.gears[0].stages)
    await rig.router.catalogue.put_deployment(record, gear_plan=plan_text(plan))
    await rig.until(lambda: in_force(rig)[0] == plan.version)


def in_force(rig: Rig) -> tuple[int, int]:
    pinned = rig.router.gears.pin(NAME)
    return (pinned.version, pinned.index) if pinned else (0, -1)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as started:
        for name in ("small", "large"):
            await started.add_model(name)
        for node in ("node-a", "node-b"):
            await put_worker(started, node)
        yield started


async def test_the_gear_in_force_decides_and_is_said(rig: Rig) -> None:
    rig.worker(small=Answer("no", logprob=LOW), large=Answer("yes"))
    await deploy(rig, PLAN)
    outcome = await rig.ask("chat")
    assert outcome.text() == "yes"
    assert [report.model for report in outcome.ends[0].stages] == ["small", "large"]
    assert rig.router.gears.pin(NAME) is not None
    assert in_force(rig) == (1, 0)
    shown = rig.router.service.metrics.render(0, {}, rig.router.gears.gears_in_force()).decode()
    assert 'gearfall_gear{model="chat"} 0.0' in shown
    assert 'gearfall_gear_plan_version{model="chat"} 1.0' in shown


async def test_what_a_plan_has_go_up_is_of_the_answers_below(rig: Rig) -> None:
    await deploy(rig, PLAN)
    gear = rig.router.gears.pin(NAME)
    assert gear is not None
    three = (Stage(ModelName("small"), 0.5), Stage(ModelName("medium"), 0.5), Stage(ModelName("l")))
    for reached, expected in (
        ((1.0, 0.4, 0.1), {"medium": 0.4, "l": 0.25}),
        ((1.0, 0.4, 0.0), {"medium": 0.4}),  # nothing is planned for a stage that nobody reached
        ((1.0,), {}),
    ):
        promise = replace(gear.promise, escalated=reached)
        assert replace(gear, planned=three, promise=promise).planned_up == pytest.approx(expected)


async def test_another_routers_vote_shifts_this_one(rig: Rig) -> None:
    rig.worker(small=Answer("no", logprob=LOW), large=Answer("yes"))
    await deploy(rig, PLAN)
    lease = await rig.cluster.grant_lease(60)
    vote = GearVoteRecord(NAME, RouterId("other"), 1, 1, 1000.0, 0.0)
    await rig.cluster.wait_seen(await rig.cluster.put_gear_vote(vote, lease=lease))
    assert in_force(rig) == (1, 1)
    assert (await rig.ask("chat")).text() == "no"
    await lease.revoke()
    await rig.until(lambda: in_force(rig) == (1, 0))


async def test_a_vote_for_an_older_plan_does_not_count(rig: Rig) -> None:
    await deploy(rig, PLAN, version=2)
    lease = await rig.cluster.grant_lease(60)
    vote = GearVoteRecord(NAME, RouterId("other"), 1, 1, 0.0, 0.0)
    await rig.cluster.wait_seen(await rig.cluster.put_gear_vote(vote, lease=lease))
    assert in_force(rig) == (2, 0)


async def test_a_burst_shifts_up_and_tells_the_others(rig: Rig) -> None:
    await deploy(rig, PLAN)
    for _ in range(500):
        rig.router.gears.arrived(NAME, 200)
    await rig.until(lambda: in_force(rig) == (1, 1))
    await rig.until(lambda: any(v.gear == 1 for v in rig.cluster.view.gear_votes.values()))


async def test_what_waits_counts_with_its_prompts_and_the_answers_that_are_expected(
    rig: Rig,
) -> None:
    """Prompt tokens as they are; of an answer no more than it may become."""
    await deploy(rig, PLAN)
    short = Backlog(jobs=2, since_unix_s=1.0, prompt_tokens=900, output_tokens=10)
    long = Backlog(jobs=3, since_unix_s=1.0, prompt_tokens=60, output_tokens=3000)
    rig.router.demand.set_waiting(SMALL, short)
    rig.router.demand.set_waiting(LARGE, long)
    rig.router.demand.set_waiting(ModelName("of-nobody"), long)
    expected = 10 + 3 * TYPICAL_ANSWER_TOKENS

    def told() -> set[float]:
        return {each.queued_tokens for each in rig.cluster.view.gear_votes.values()}

    await rig.until(lambda: told() == {960.0 + expected})
    for model in (SMALL, LARGE, ModelName("of-nobody")):
        rig.router.demand.set_waiting(model, Backlog())
    await rig.until(lambda: told() == {0.0})


async def test_the_first_answers_replace_what_was_guessed_of_them(rig: Rig) -> None:
    """A guess that is far too long would hold a high gear until many answers outweigh it."""
    await deploy(rig, PLAN)
    board = rig.router.gears
    for tokens in (4, 8):
        board.answered(NAME, tokens)
    assert board._following[NAME].answer_tokens == 6.0
    for _ in range(200):
        board.answered(NAME, 100)
    assert board._following[NAME].answer_tokens == pytest.approx(100.0, abs=1.0)
    await deploy(rig, PLAN, version=2)
    assert board._following[NAME].answer_tokens == pytest.approx(100.0, abs=1.0)


async def set_kv_share(rig: Rig, model: ModelName, share: float) -> None:
    (record,) = (each for each in rig.cluster.view.replicas.values() if each.model == model)
    lease = await rig.cluster.grant_lease(60)
    await rig.cluster.put_replica(replace(record, kv_share=share), lease=lease)


async def test_a_replica_whose_memory_is_full_shifts_up(rig: Rig) -> None:
    await deploy(rig, PLAN)
    await set_kv_share(rig, LARGE, 0.99)
    await rig.until(lambda: in_force(rig) == (1, 1))


async def test_memory_of_a_model_that_the_gear_does_not_ask_is_not_looked_at(rig: Rig) -> None:
    await deploy(rig, replace(PLAN, gears=(gear(ALONE), gear(CASCADE, 1e6)), variants=()))
    await set_kv_share(rig, LARGE, 0.99)
    await set_kv_share(rig, SMALL, 0.5)
    board = rig.router.gears
    following = board._following[NAME]
    await rig.until(lambda: board._kv_share(following) == 0.5)
    before = following.state.at_s
    await rig.until(lambda: following.state.at_s > before)
    assert in_force(rig) == (1, 0)


async def test_a_write_that_hangs_stops_no_sampling(rig: Rig) -> None:
    await deploy(rig, PLAN)
    board, reached = rig.router.gears, asyncio.Event()

    async def hang(*_: object, **__: object) -> int:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError("never")

    board._cluster = _Hanging(rig.cluster, hang)  # type: ignore[assignment]
    for _ in range(500):
        board.arrived(NAME, 200)
    await reached.wait()
    before = board._following[NAME].state.at_s
    await rig.until(lambda: board._following[NAME].state.at_s > before)
    assert in_force(rig) == (1, 1)


class _Hanging:
    """The cluster, but for the writing of votes."""

    def __init__(self, cluster: Cluster, put: Callable[..., Awaitable[int]]) -> None:
        self._cluster = cluster
        self.put_gear_vote = put

    def __getattr__(self, name: str) -> object:
        return getattr(self._cluster, name)


async def test_a_running_request_keeps_its_gear_over_a_reload(rig: Rig) -> None:
    worker = rig.worker(small=Answer("no", logprob=LOW), large=Answer("yes"))
    await deploy(rig, PLAN)
    before = rig.router.gears.pin(NAME)
    await deploy(rig, replace(PLAN, gears=(gear(ALONE),), variants=()), version=2)
    after = rig.router.gears.pin(NAME)
    assert before is not None
    assert after is not None
    assert (before.label, before.stages) == ("1/0", CASCADE)
    assert (after.label, after.stages) == ("2/0", ALONE)
    assert (await rig.ask("chat")).text() == "no"
    assert {job.model for job in worker.jobs} == {"small"}


async def test_a_lost_node_has_its_own_gears(rig: Rig) -> None:
    await deploy(rig, PLAN)
    await rig.cluster.state.delete(key_of("workers", WorkerId("on-node-b")))
    await rig.until(lambda: (pin := rig.router.gears.pin(NAME)) is not None and pin.stages == ALONE)


async def test_a_calibration_decides_in_place_of_the_measure(rig: Rig) -> None:
    """It maps the mean log-probability; the threshold is a probability to be right."""
    rig.worker(small=Answer("abc", logprob=HIGH), large=Answer("yes"))
    doubtful = Calibration(("mean",), (0.0,), (1.0,), (1.0,), 0.0, ((0.0, 0.1), (1.0, 0.1)))
    assert probability(HIGH, 4) > 0.5
    await deploy(rig, replace(PLAN, calibrations={"small": doubtful}))
    outcome = await rig.ask("chat")
    assert outcome.text() == "yes"
    (first, _) = outcome.ends[0].stages
    assert first.measure == "calibrated"
    assert first.certainty == pytest.approx(0.1)


@pytest.mark.parametrize("mode", [None, StreamMode.BUFFER, StreamMode.EARLY, StreamMode.DRAFT])
async def test_a_plan_for_beginnings_decides_on_them_in_every_mode(rig: Rig, mode) -> None:
    """`sure` becomes unsure behind the beginning, `late` sure: neither changes who answers."""
    await deploy(rig, replace(PLAN, hold_tokens=2))
    worker = rig.worker(small=Answer("sure", logprobs=(0.0, 0.0, -9.0)), large=Answer("large"))
    sure = await rig.ask("chat", stream_mode=mode)
    assert sure.text() == "sure"
    assert sure.ends[0].stages[0].certainty == pytest.approx(1.0)
    worker.answers["small"] = Answer("late", logprobs=(-3.0, -3.0, 0.0))
    late = await rig.ask("chat", stream_mode=mode)
    assert late.ends[0].model == "large"


async def test_other_beginnings_than_the_plans_are_refused(rig: Rig) -> None:
    await deploy(rig, replace(PLAN, hold_tokens=2))
    with pytest.raises(InvalidRequest, match="the gear plan decides on the first 2 tokens"):
        await rig.ask("chat", stream_mode=StreamMode.EARLY, hold_tokens=3)
    bad = plan_text(replace(PLAN, hold_tokens=-1))
    record = DeploymentRecord(NAME, PLAN.gears[0].stages)
    with pytest.raises(InvalidRequest, match=r"plan.hold_tokens -1 must be between"):
        await rig.router.catalogue.put_deployment(record, gear_plan=bad)


async def test_without_a_plan_the_deployments_own_stages_count_again(rig: Rig) -> None:
    rig.worker(small=Answer("no", logprob=LOW), large=Answer("yes"))
    await deploy(rig, PLAN)
    await rig.router.catalogue.put_deployment(DeploymentRecord(NAME, ALONE))
    await rig.until(lambda: rig.router.gears.pin(NAME) is None)
    assert (await rig.ask("chat")).text() == "no"


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (replace(PLAN, name="other"), "is for other"),
        (replace(PLAN, models={"small": "0" * 32, "large": ""}), "profile and plan anew"),
        (replace(PLAN, version=0), "begins at 1"),
    ],
)
async def test_a_plan_that_does_not_fit_is_refused(rig: Rig, plan: GearPlan, says: str) -> None:
    record = DeploymentRecord(NAME, CASCADE)
    with pytest.raises(InvalidRequest, match=says):
        await rig.router.catalogue.put_deployment(record, gear_plan=plan_text(plan))
    assert not rig.cluster.view.gear_plans
