"""Whatever gears, plans and nodes do while requests are on their way, each is answered as it began.

A request is answered by the stages of the gear that it was admitted with, of the plan version that
was deployed then, though that plan is long replaced, withdrawn, or on other nodes.
"""

import asyncio
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.gears.gear_plan import GearPlan, plan_text
from gearfall.core.gears.gear_records import GearVoteRecord
from gearfall.core.gears.gears_in_force import on_nodes
from gearfall.core.ids import RouterId, WorkerId
from gearfall.core.ports import Lease
from gearfall.core.records import DeploymentRecord
from gearfall.infra.state.cluster_keys import key_of
from services.router.gears.gear_board import PinnedGear
from services.router.generation import GenerationRequest, TextPrompt
from tests.services.router.gears.test_gear_board import (
    ALONE,
    CASCADE,
    LOW,
    NAME,
    PLAN,
    gear,
    in_force,
    put_worker,
)
from tests.services.router.rig import Answer, Outcome, Rig, ScriptedWorker, running_rig

OWN = DeploymentRecord(NAME, ALONE)
"""What the deployment asks where no plan stands."""
PLANS = (
    PLAN,
    replace(PLAN, gears=(gear(ALONE), gear(CASCADE, 1e6)), variants=()),
    replace(PLAN, gears=(gear(CASCADE, 1e6),), variants=()),
)

steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 3)),
        st.tuples(st.just("vote"), st.integers(0, 3)),
        st.tuples(st.just("burst"), st.just(0)),
        st.tuples(st.just("plan"), st.integers(0, len(PLANS) - 1)),
        st.tuples(st.sampled_from(("withdraw", "lose", "return", "hold", "go")), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@dataclass
class Scene:
    """A router with requests on their way, and what each was admitted with."""

    rig: Rig
    worker: ScriptedWorker
    lease: Lease
    plans: dict[int, GearPlan] = field(default_factory=dict)
    """By version, as they were deployed."""
    tasks: list[asyncio.Task[tuple[PinnedGear | None, Outcome]]] = field(default_factory=list)

    async def ask(self, count: int) -> None:
        for _ in range(count):
            self.tasks.append(asyncio.create_task(self._one()))
        await asyncio.sleep(0)

    async def _one(self) -> tuple[PinnedGear | None, Outcome]:
        running = await self.rig.router.service.start(GenerationRequest(NAME, (TextPrompt("hi"),)))
        outcome = Outcome()
        async for batch in running.batches():
            outcome.events += batch
        return running.gear, outcome

    async def vote(self, wanted: int) -> None:
        version = max(self.plans, default=1)
        record = GearVoteRecord(NAME, RouterId("other"), version, wanted, 0.0, 0.0)
        cluster = self.rig.cluster
        await cluster.wait_seen(await cluster.put_gear_vote(record, lease=self.lease))

    async def burst(self, _: int) -> None:
        self.rig.router.gears.arrived(NAME, 10**6)

    async def plan(self, number: int) -> None:
        version = max(self.plans, default=0) + 1
        self.plans[version] = replace(PLANS[number], version=version)
        await self.rig.router.catalogue.put_deployment(
            OWN, gear_plan=plan_text(self.plans[version])
        )
        await self.rig.until(lambda: in_force(self.rig)[0] == version)

    async def withdraw(self, _: int) -> None:
        await self.rig.router.catalogue.put_deployment(OWN)
        await self.rig.until(lambda: self.rig.router.gears.pin(NAME) is None)

    async def lose(self, _: int) -> None:
        await self.rig.cluster.state.delete(key_of("workers", WorkerId("on-node-b")))

    async def return_(self, _: int) -> None:
        await put_worker(self.rig, "node-b")

    async def hold(self, _: int) -> None:
        self.worker.gate.clear()

    async def go(self, _: int) -> None:
        self.worker.gate.set()

    def check(self, pinned: PinnedGear | None, outcome: Outcome) -> None:
        """Every stage was uncertain, so that each of the gear's was asked, in order."""
        (end,) = outcome.ends
        asked = tuple(report.model for report in end.stages)
        if pinned is None:
            assert asked == tuple(stage.model for stage in OWN.stages)
            return
        assert asked == tuple(stage.model for stage in pinned.stages)
        assert end.model == pinned.stages[-1].model
        plan = self.plans[pinned.version]
        gears = [on_nodes(plan, nodes)[0] for nodes in (("node-a", "node-b"), ("node-a",))]
        allowed = [each[pinned.index].stages for each in gears if pinned.index < len(each)]
        assert pinned.stages in allowed


async def _play(moves: list[tuple[str, int]]) -> None:
    async with running_rig() as rig:
        for name in ("small", "large"):
            await rig.add_model(name)
        for node in ("node-a", "node-b"):
            await put_worker(rig, node)
        worker = rig.worker(small=Answer("a", logprob=LOW), large=Answer("b", logprob=LOW))
        worker.hold_at = 0
        worker.gate.set()
        scene = Scene(rig, worker, await rig.cluster.grant_lease(60))
        await scene.plan(0)
        for name, argument in (*moves, ("ask", 1), ("go", 0)):
            await getattr(scene, "return_" if name == "return" else name)(argument)
        await rig.until(lambda: all(task.done() for task in scene.tasks), within_s=20.0)
        for task in scene.tasks:
            scene.check(*task.result())


@settings(max_examples=15)
@given(steps)
def test_no_request_is_stranded_or_sent_elsewhere_by_a_switch(
    moves: list[tuple[str, int]],
) -> None:
    asyncio.run(_play(moves))
