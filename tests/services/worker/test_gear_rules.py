"""A worker reads its claim rule from cluster state and follows plans, votes and replicas."""

from contextlib import AsyncExitStack

from gearfall.core.gears.claim_rule import ClaimRule
from gearfall.core.gears.gear_plan import Gear, GearPlan, PlacedReplicas, Promise, plan_text
from gearfall.core.gears.gear_records import GearPlanRecord, GearVoteRecord
from gearfall.core.ids import DeploymentName, RouterId
from gearfall.core.records import ReplicaRecord, ReplicaState, Stage
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from services.worker.gear_rules import GearRules
from tests.services.worker.fakes import MODEL, NODE, WORKER, worker_record

NAME = DeploymentName("chat")
PROMISE = Promise(0.9, 0.0, 0.1, 0, 1.0, 0.0, (1.0,))


def gear(max_load: float, **more: object) -> Gear:
    return Gear(max_load, (Stage(MODEL),), PROMISE, **more)  # type: ignore[arg-type]


PLAN = GearPlan(
    *("chat", 1, 1.0, "a test", "FLOP", {str(MODEL): ""}),
    gears=(gear(10.0, shares={str(MODEL): {str(NODE): 1.0}}), gear(20.0, triggers={str(MODEL): 8})),
    placement=(PlacedReplicas(str(NODE), str(MODEL), 1),),
)


async def test_the_rule_follows_plan_votes_and_replicas() -> None:
    async with AsyncExitStack() as stack:
        state = MemoryState()
        stack.push_async_callback(state.close)
        cluster = Cluster(state)
        await cluster.start()
        stack.push_async_callback(cluster.stop)
        lease, rules = await state.grant_lease(60), GearRules(cluster, WORKER)
        await cluster.put_worker(worker_record(), lease=lease)
        assert rules.rule_for(MODEL) == ClaimRule()

        revision = await cluster.put_gear_plan(GearPlanRecord(NAME, 1, plan_text(PLAN)))
        await cluster.wait_seen(revision)
        assert rules.rule_for(MODEL) == ClaimRule(), "it has no replica yet"
        ready = ReplicaRecord(WORKER, NODE, MODEL, ReplicaState.READY, 2, 0, 1, 64, 5.0)
        await cluster.wait_seen(await cluster.put_replica(ready, lease=lease))
        assert rules.rule_for(MODEL).share == 1.0

        vote = GearVoteRecord(NAME, RouterId("r"), 1, 1, 1.0, 0.0)
        await cluster.wait_seen(await cluster.put_gear_vote(vote, lease=lease))
        assert rules.rule_for(MODEL).share is None
        assert rules.rule_for(MODEL).trigger == 8

        await cluster.delete_gear_plan(NAME)
        await cluster.wait_seen((await state.list("")).revision)
        assert rules.rule_for(MODEL) == ClaimRule()
