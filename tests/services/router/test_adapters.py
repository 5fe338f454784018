"""Adapters at the door: asked for by their own name, queued for their base, refused when unfit."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gearfall.core.errors import Conflict, GearfallError, NotFound, Unavailable
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import (
    DeploymentRecord,
    ModelRecord,
    NodeRecord,
    ReplicaState,
    Stage,
)
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreServicer, add_StoreServicer_to_server
from services.router.stages.cascade import cost_flops
from tests.services.router.char_models import NODE, model_record
from tests.services.router.rig import Answer, Rig, running_rig


def adapter_record(name: str, base: str = "base", **changes: object) -> ModelRecord:
    facts = {"base": base, "base_digest": f"digest-{base}", "parameters": 30}
    return replace(model_record(name), **(facts | changes))  # type: ignore[arg-type]


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as rig:
        await rig.add_model("base")
        await rig.cluster.wait_seen(await rig.cluster.put_model(adapter_record("tuned")))
        yield rig


async def test_an_adapters_job_is_its_bases_with_the_adapter(rig: Rig):
    worker = rig.worker(base=Answer("tuned answer"))
    outcome = await rig.ask("tuned")
    await rig.ask("base")
    assert outcome.text() == "tuned answer"
    assert [(job.model, job.adapter) for job in worker.jobs] == [("base", "tuned"), ("base", "")]
    (end,) = outcome.ends
    assert end.model == "tuned"
    tokens = end.usage.prompt_tokens + end.usage.completion_tokens
    assert end.usage.cost_flops == cost_flops(1000 + 30, tokens)


async def test_an_adapter_is_as_ready_as_its_base(rig: Rig):
    service = rig.router.service
    assert service.readiness(ModelName("tuned")) == (True, True)
    assert service.expected_start_s(ModelName("tuned")) == 0.0
    await rig.set_replica("base", ReplicaState.STARTING)
    assert service.readiness(ModelName("tuned")) == (False, True)
    expected_s = service.expected_start_s(ModelName("tuned"))
    assert expected_s == service.expected_start_s(ModelName("base")) > 0.0


async def test_an_adapter_may_be_a_stage(rig: Rig):
    await rig.deploy("both", ("tuned", 0.99), ("base", None))
    worker = rig.worker(base=Answer(logprob=-1.0))
    outcome = await rig.ask("both")
    assert [job.adapter for job in worker.jobs] == ["tuned", ""]
    assert outcome.ends[0].model == "base"


@pytest.mark.parametrize(
    ("record", "error", "text"),
    [
        (adapter_record("lost", "nobody"), Unavailable, "not registered"),
        (adapter_record("old", base_digest="other"), Unavailable, "other bytes"),
        (adapter_record("going", is_removing=True), NotFound, "going"),
    ],
)
async def test_an_adapter_without_its_base_is_refused(
    rig: Rig, record: ModelRecord, error: type[GearfallError], text: str
):
    await rig.cluster.wait_seen(await rig.cluster.put_model(record))
    with pytest.raises(error, match=text):
        await rig.ask(record.name)


async def test_an_unknown_adapter_is_a_model_that_does_not_exist(rig: Rig):
    with pytest.raises(NotFound, match="does not exist") as caught:
        await rig.ask("tuned-2")
    assert caught.value.code == "model_not_found"


async def test_a_base_stays_while_it_has_adapters(rig: Rig):
    with pytest.raises(Conflict, match="the base of tuned"):
        await rig.router.catalogue.remove_model("base")


async def test_an_adapter_stays_while_a_request_runs_on_it(rig: Rig):
    worker = rig.worker(base=Answer())
    worker.hold_at = 1
    task = asyncio.create_task(rig.ask("tuned"))
    await worker.held.wait()
    with pytest.raises(Conflict, match="requests are running"):
        await rig.router.catalogue.remove_model("tuned")
    worker.gate.set()
    assert (await task).text() == "hello"


async def test_an_adapter_is_removed_when_no_replica_holds_it(rig: Rig):
    lease = await rig.cluster.grant_lease(60)
    held = next(iter(rig.cluster.view.replicas.values()))
    holding = replace(held, adapters=(ModelName("tuned"),))
    await rig.cluster.wait_seen(await rig.cluster.put_replica(holding, lease=lease))
    removing = asyncio.create_task(rig.router.catalogue.remove_model("tuned"))
    await rig.until(lambda: rig.cluster.view.models[ModelName("tuned")].is_removing)
    assert not removing.done()
    await rig.cluster.put_replica(held, lease=lease)
    await removing
    assert ModelName("tuned") not in rig.cluster.view.models


class LeasedStore(StoreServicer):
    """A store whose last lease ends a moment after the view says that nobody has the model."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    async def DeleteModel(
        self, request: store_pb2.DeleteModelRequest, _context: object
    ) -> store_pb2.DeleteModelReply:
        if self.refusals:
            self.refusals -= 1
            raise Conflict(f"model {request.model!r} is in use by worker-a")
        return store_pb2.DeleteModelReply()


async def test_a_lease_that_the_view_does_not_show_is_waited_for(rig: Rig):
    store = LeasedStore(refusals=2)  # type: ignore[abstract] # its other calls are not made
    server = await start_server(
        "127.0.0.1:0",
        lambda server: add_StoreServicer_to_server(store, server),
        ("gearfall.v1.Store",),
    )
    node = NodeRecord(NODE, server.address, "/nowhere", 2**30, 0, 0.0)
    lease = await rig.cluster.grant_lease(60)
    await rig.cluster.wait_seen(await rig.cluster.put_node(node, lease=lease))
    await rig.router.catalogue.remove_model("tuned")
    assert store.refusals == 0
    assert ModelName("tuned") not in rig.cluster.view.models
    await server.stop(0.0)


async def test_a_deployment_that_names_an_adapter_keeps_it(rig: Rig):
    record = DeploymentRecord(DeploymentName("tuned-chat"), (Stage(ModelName("tuned")),))
    await rig.router.catalogue.put_deployment(record)
    with pytest.raises(Conflict, match="tuned-chat"):
        await rig.router.catalogue.remove_model("tuned")
