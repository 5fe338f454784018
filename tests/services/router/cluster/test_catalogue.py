"""Operators' calls that are refused before anything is written."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gearfall.core.certainty.escalation import AtOverload, EscalationPolicy
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import (
    Gear,
    GearPlan,
    PlacedReplicas,
    Promise,
    Variant,
    plan_text,
)
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from tests.services.router.rig import Rig, running_rig

NAME = DeploymentName("chat")
CASCADE = (Stage(ModelName("small"), 0.5), Stage(ModelName("large")))
CAPPED = DeploymentRecord(
    NAME, CASCADE, escalation=EscalationPolicy(at_overload=AtOverload.ANSWER), shadow_share=0.0
)
PLACED = tuple(
    PlacedReplicas(node, model, 1) for node in ("node-a", "node-b") for model in ("small", "large")
)


def gear(p95_s: float) -> Gear:
    return Gear(1e9, CASCADE, Promise(0.9, 0.0, 0.1, 2000, 1.0, p95_s, (1.0, 0.3)))


def plan(p95_s: float, *, without_b_p95_s: float) -> GearPlan:
    variants = (Variant("node-b", (gear(without_b_p95_s),), PLACED[:2]),)
    return GearPlan(
        "chat", 1, 1.0, "a test", "FLOP", {"small": "", "large": ""}, (gear(p95_s),), PLACED,
        variants=variants,
    )  # fmt: skip


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as started:
        for name in ("small", "large"):
            await started.add_model(name)
        yield started


@pytest.mark.parametrize("promised_s", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
async def test_a_cap_without_a_promise_to_hold_queues_against_is_refused(
    rig: Rig, promised_s
) -> None:
    text = plan_text(plan(promised_s[0], without_b_p95_s=promised_s[1]))
    with pytest.raises(InvalidRequest, match="promises no p95_s") as refused:
        await rig.router.catalogue.put_deployment(CAPPED, gear_plan=text)
    assert refused.value.param == "escalation.queue_target_s"
    assert not rig.cluster.view.gear_plans
    targeted = replace(CAPPED, escalation=replace(CAPPED.escalation, queue_target_s=1.0))
    await rig.router.catalogue.put_deployment(targeted, gear_plan=text)


async def test_a_cap_that_every_gear_has_a_promise_for_is_taken(rig: Rig) -> None:
    text = plan_text(plan(1.0, without_b_p95_s=2.0))
    await rig.router.catalogue.put_deployment(CAPPED, gear_plan=text)
    assert rig.cluster.view.gear_plans[NAME].content == text
