"""The gRPC door, with the public client and with bare stubs."""

import asyncio
from typing import Any, cast

import grpc
import pytest

from gearfall.client import AsyncClient
from gearfall.core.certainty.escalation import (
    AtDeadline,
    AtOverload,
    EscalationPolicy,
    WhileLoading,
)
from gearfall.core.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from gearfall.core.generation.streaming import Streaming, StreamMode
from gearfall.core.ids import DeploymentName, ModelName, RequestId, WorkerId
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.net.bearer import bearer_metadata
from gearfall.infra.net.convert import deployment_from_pb
from gearfall.infra.net.grpc_channels import MAX_MESSAGE_BYTES, open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.pb import common_pb2, router_pb2_grpc
from gearfall.pb import router_pb2 as pb
from services.router.doors.servicer import RouterServicer
from services.router.generation import Delta
from services.router.running_request import RunningRequest
from tests.services.router.rig import Answer, running_rig


@pytest.fixture
async def rig():
    async with running_rig() as rig:
        await rig.add_model("small", parameters=10)
        await rig.add_model("large", parameters=100)
        yield rig


@pytest.fixture
async def client(rig):
    async with AsyncClient(rig.router.grpc_address) as client:
        yield client


def deployment(*stages, name="both", **fields):
    built = tuple(Stage(ModelName(model), threshold) for model, threshold in stages)
    return DeploymentRecord(DeploymentName(name), built, **fields)


@pytest.mark.parametrize(
    ("prompt", "options", "param", "code"),
    [
        ("hi", {"tenant": "t" * 129}, "tenant", None),
        ([{"role": "", "content": "hi"}], {}, "messages[0].role", None),
        ("x" * 300, {}, "prompt", "context_length_exceeded"),
    ],
)
async def test_a_refusal_names_field_and_code(client, prompt, options, param, code):
    with pytest.raises(InvalidRequest) as refused:
        await client.generate("small", prompt, **options)
    assert (refused.value.param, refused.value.code) == (param, code)


async def test_generate_through_the_client(rig, client):
    rig.worker(small=Answer("wrong", logprob=-1.0), large=Answer("right"))
    await client.deploy(deployment(("small", 0.5), ("large", None)))
    answer = await client.generate("both", "hi", request_id="mine", logprobs=True)
    assert answer.text == "right"
    explained = await client.explain_request("mine")
    decisions = [each.decision for each in explained.explanations]
    assert decisions[0] == "finished"
    assert decisions[-1] == "admitted"
    assert "escalated" in decisions
    assert decisions.count("answered") == decisions.count("claimed") == 2
    times = {each.decision: each.measured_s for each in explained.explanations}
    assert times["finished"] > times["answered"] > 0


async def test_a_deployment_is_explained_by_its_plan(rig, client):
    await client.deploy(deployment(("small", 0.5), ("large", None)))
    (told,) = (await client.explain_model("both")).explanations
    assert (told.subject, told.decision) == ("both", "nothing measured")
    assert told.reason == "it follows no gear plan"
    assert not (await client.status()).alarms


async def test_a_stream_begins_with_whether_its_answer_was_there(rig, client):
    await client.deploy(deployment(("small", 0.5), ("large", None), cache_bytes=1 << 20))
    rig.worker(small=Answer("sure", logprob=-0.01))
    said = []
    for _ in range(2):
        events = [each async for each in client.stream("both", "hi", temperature=0.0)]
        said.append(events[0].cache)
    assert said == ["miss", "hit"]


async def test_events_of_the_wire(rig):
    rig.worker(small=Answer("hello"))
    async with open_channel(rig.router.grpc_address) as channel:
        call = router_pb2_grpc.RouterStub(channel).Generate(
            pb.GenerateRequest(model="small", text="hi", logprobs=True, seed=7, n=2)
        )
        events = [event async for event in call]
    assert events[0].start.seed == 7
    deltas = [event.delta for event in events if event.HasField("delta")]
    assert "".join(each.text for each in deltas if each.choice == 1) == "hello"
    assert [token.token for each in deltas if each.choice == 0 for token in each.logprobs] == list(
        "hello"
    )
    ends = [event.end for event in events if event.HasField("end")]
    assert {end.choice for end in ends} == {0, 1}
    assert ends[0].stages[0].certainty.measure == "sequence_probability"
    assert ends[0].usage.completion_tokens == 6


async def test_a_cancelled_call_stops_the_work(rig):
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    async with open_channel(rig.router.grpc_address) as channel:
        call = router_pb2_grpc.RouterStub(channel).Generate(
            pb.GenerateRequest(model="small", text="hi")
        )
        await call.read()
        await worker.held.wait()
        call.cancel()
        await worker.replied.wait()
    assert worker.stops


async def test_a_whole_answer_is_one_message_with_all_its_events(rig):
    rig.worker(small=Answer("hello"))
    async with open_channel(rig.router.grpc_address) as channel:
        request = pb.GenerateRequest(model="small", text="hi", n=2)
        events = (await router_pb2_grpc.RouterStub(channel).Answer(request)).events
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds.count("start"), kinds.count("end")) == ("start", 1, 2)
    deltas = [event.delta for event in events if event.HasField("delta")]
    for choice in range(2):
        assert "".join(each.text for each in deltas if each.choice == choice) == "hello"


async def test_a_whole_answer_that_nobody_waits_for_any_more_is_not_computed_on(rig, client):
    worker = rig.worker(small=Answer("hello"))
    worker.hold_at = 2
    waiting = asyncio.create_task(client.generate("small", "hi"))
    await worker.held.wait()
    waiting.cancel()
    await worker.replied.wait()
    assert worker.stops


async def test_a_whole_answer_that_no_message_holds_is_refused_while_it_is_computed():
    ended: list[RunningRequest] = []
    running = RunningRequest(
        RequestId("r"), deployment="small", seed=0, choices=1, on_end=ended.append
    )

    class Service:
        async def start(self, _: object) -> RunningRequest:
            return running

    unused: Any = None
    servicer = RouterServicer(cast("Any", Service()), unused, unused, unused)
    running.emit(Delta(0, "x" * MAX_MESSAGE_BYTES))
    asking = pb.GenerateRequest(model="small", text="hi")
    with pytest.raises(InvalidRequest, match="as a stream") as refused:
        async with asyncio.timeout(10):
            await servicer.Answer(asking, unused)
    assert running.error is refused.value
    assert ended == [running]


BAD_DEPLOYMENTS = [
    (deployment(), InvalidRequest),
    (deployment(("nobody", None)), NotFound),
    (deployment(("small", None), ("large", None)), InvalidRequest),
    (deployment(("small", 1.5), ("large", None)), InvalidRequest),
    (deployment(("small", float("nan")), ("large", None)), InvalidRequest),
    (deployment(("small", 0.5)), InvalidRequest),
    (deployment(("small", 0.5), ("small", None)), InvalidRequest),
    (deployment(("small", None), name="../x"), InvalidRequest),
    (deployment(("large", None), name="small"), Conflict),
    (deployment(("small", None), min_replicas=2, max_replicas=1), InvalidRequest),
    (deployment(("small", None), max_replicas=0), InvalidRequest),
    (deployment(("small", None), keep_alive_s=-1.0), InvalidRequest),
    (deployment(("small", None), keep_alive_s=float("inf")), InvalidRequest),
    (deployment(("small", None), certainty="vibes"), InvalidRequest),
]


async def test_bad_deployments_are_refused(client):
    for wanted, kind in BAD_DEPLOYMENTS:
        with pytest.raises(kind):
            await client.deploy(wanted)
    assert not (await client.models()).deployments


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"stream_mode": "eager"}, "buffer, early, draft"),
        ({"stream_mode": "early", "hold_tokens": 5000}, "between 1 and 4096"),
        ({"stream_mode": "draft", "hold_tokens": 5}, "no effect"),
    ],
)
async def test_the_server_refuses_stream_modes_that_another_client_would_send(rig, fields, says):
    async with open_channel(rig.router.grpc_address) as channel:
        call = router_pb2_grpc.RouterStub(channel).Generate(
            pb.GenerateRequest(model="small", text="hi", **fields)
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in (refused.value.details() or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_replicas": 1, "min_replicas": 2}, "max_replicas"),
        ({"max_replicas": 1, "keep_alive_s": float("nan")}, "keep_alive_s"),
        ({"max_replicas": 1, "target_jobs": 2**32 - 1}, "target_jobs"),
        ({"max_replicas": 1, "accelerators": 999}, "accelerators"),
        ({"max_replicas": 1, "labels": {"": "x"}}, "labels"),
        ({"max_replicas": 1, "streaming": {"mode": "eager"}}, "streaming.mode"),
        ({"max_replicas": 1, "streaming": {"hold_tokens": 5000}}, "streaming.hold_tokens"),
    ],
)
async def test_the_server_refuses_what_another_client_would_send(rig, fields, param):
    wanted = common_pb2.Deployment(
        name="both",
        stages=[common_pb2.Stage(model="small")],
        certainty="min_margin",
        **fields,
    )
    async with open_channel(rig.router.grpc_address) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.PutDeployment(pb.PutDeploymentRequest(deployment=wanted))
    error = error_from_rpc(refused.value)
    assert isinstance(error, InvalidRequest)
    assert error.param == param


async def test_a_deployment_keeps_every_field(client):
    wanted = deployment(
        ("small", 0.5),
        ("large", None),
        min_replicas=1,
        max_replicas=3,
        keep_alive_s=2.5,
        target_jobs=4,
        target_queued_tokens=900,
        spread=True,
        shadow_share=0.0,
        cache_bytes=1 << 20,
        escalation=EscalationPolicy(
            WhileLoading.ANSWER, AtDeadline.FAIL, AtOverload.ANSWER, queue_target_s=1.5
        ),
        streaming=Streaming(StreamMode.EARLY, 5, finishes_drafts=True),
    )
    assert await client.deploy(wanted) == wanted
    (stored,) = (await client.models()).deployments
    assert deployment_from_pb(stored) == wanted


async def test_models_and_deployments_come_and_go(rig, client):
    await client.deploy(deployment(("small", 0.5), ("large", None)))
    listed = await client.models()
    assert [each.name for each in listed.deployments] == ["both"]
    assert {each.name for each in listed.models} == {"small", "large"}
    with pytest.raises(Conflict, match="both"):
        await client.remove_model("small")
    await client.remove_deployment("both")
    with pytest.raises(NotFound):
        await client.remove_deployment("both")
    removal = asyncio.create_task(client.remove_model("small"))
    async for _ in rig.cluster.changes():
        if rig.cluster.view.models[ModelName("small")].is_removing:
            break
    with pytest.raises(NotFound):
        await client.generate("small", "hi")
    assert not removal.done()
    await rig.cluster.delete_replica(WorkerId("worker-a"), ModelName("small"))
    await removal
    with pytest.raises(NotFound):
        await client.remove_model("small")
    with pytest.raises(NotFound):
        await client.generate("small", "hi")


async def test_registering_needs_a_store_and_a_good_name(rig, client):
    for name, path, kind in (
        ("../x", "/models/x", InvalidRequest),
        ("fine", "relative", InvalidRequest),
        ("fine", "/models/x", Unavailable),
    ):
        with pytest.raises(kind):
            _ = [each async for each in client.register_model(name, path)]


async def test_status_says_what_is_degraded(rig, client):
    status = await client.status()
    assert status.router_id == rig.router.router_id
    assert {each.model for each in status.queues} == {"small", "large"}
    assert any("scheduler" in words for words in status.degraded)
    rig.queue_server.stop()
    assert any("queue" in words for words in (await client.status()).degraded)
    rig.queue_server.start()
    with pytest.raises(Unavailable):
        await client.explain_model("small")
    with pytest.raises(NotFound):
        await client.explain_request("unknown")


async def test_a_push_stream_starts_with_hello(rig):
    async with open_channel(rig.router.grpc_address) as channel:
        call = router_pb2_grpc.TokenSinkStub(channel).Push()
        await call.write(pb.WorkerPush(claim=pb.JobClaim(job_id="x", epoch=1)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_api_keys_guard_every_method_of_the_router_and_not_the_token_sink():
    async with running_rig(api_keys=("one", "two")) as rig:
        await rig.add_model("small")
        rig.worker(small=Answer("hello"))
        address = rig.router.grpc_address
        for key in ("", "three"):
            async with AsyncClient(address, api_key=key) as client:
                for call in (client.models(), client.status(), client.generate("small", "hi")):
                    with pytest.raises(Unauthenticated):
                        await call
                with pytest.raises(Unauthenticated):
                    await anext(aiter(client.register_model("x", "/nowhere")))
        async with AsyncClient(address, api_key="two") as client:
            assert (await client.generate("small", "hi")).text == "hello"
            assert [each.name for each in (await client.models()).models] == ["small"]


async def test_only_the_clusters_own_workers_push_tokens_where_there_is_a_secret():
    async with (
        running_rig(cluster_secret="hush") as rig,
        open_channel(rig.router.grpc_address) as channel,
    ):
        hello = pb.WorkerPush(hello=pb.WorkerHello(worker_id="w", node_id="n"))
        sink = router_pb2_grpc.TokenSinkStub(channel)
        stranger = sink.Push(metadata=bearer_metadata("guess"), timeout=5)
        assert await stranger.code() is grpc.StatusCode.UNAUTHENTICATED
        own = sink.Push(metadata=bearer_metadata("hush"), timeout=5)
        await own.write(hello)
        reply = await own.read()
        assert isinstance(reply, pb.RouterReply)
        assert reply.hello.router_id == rig.router.router_id
        own.cancel()
