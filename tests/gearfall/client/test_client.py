"""Both clients against a scripted router behind a real gRPC server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence

import grpc
import pytest

from gearfall.client import AsyncClient, Client, Finished, Started, TextDelta, Waiting
from gearfall.core.errors import Conflict, Internal, InvalidRequest, NotFound, Unavailable
from gearfall.core.generation.job import FinishReason, Priority
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.net.grpc_server import GrpcServer, start_server
from gearfall.pb import common_pb2, router_pb2, router_pb2_grpc, store_pb2


class ScriptedRouter(router_pb2_grpc.RouterServicer):
    """Answers by the model's name; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[router_pb2.GenerateRequest] = []
        self.waits, self.cancelled = asyncio.Event(), asyncio.Event()

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[router_pb2.GenerateEvent]:
        self.requests.append(request)
        if request.model == "unknown":
            raise NotFound("no model is called 'unknown'", param="model")
        yield router_pb2.GenerateEvent(
            start=router_pb2.GenerateStart(request_id="r1", seed=7, deployment=request.model)
        )
        yield router_pb2.GenerateEvent(
            wait=router_pb2.GenerateWait(choice=0, model="small", expected_s=0.5)
        )
        for choice in range(max(request.n, 1)):
            for text in ("4", "2"):
                yield router_pb2.GenerateEvent(
                    delta=router_pb2.GenerateDelta(
                        choice=choice,
                        text=text,
                        logprobs=[router_pb2.TokenLogprob(token_id=1, token=text, logprob=-0.5)],
                    )
                )
        if request.model == "endless":
            self.waits.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.model == "torn":
            return
        for choice in range(max(request.n, 1)):
            yield router_pb2.GenerateEvent(end=end_of(choice))

    async def Answer(
        self, request: router_pb2.GenerateRequest, context: object
    ) -> router_pb2.GenerateAnswer:
        events = [event async for event in self.Generate(request, context)]
        return router_pb2.GenerateAnswer(events=events)

    async def PutDeployment(
        self, request: router_pb2.PutDeploymentRequest, context: object
    ) -> router_pb2.PutDeploymentReply:
        return router_pb2.PutDeploymentReply(deployment=request.deployment)

    async def RemoveModel(
        self, request: router_pb2.RemoveModelRequest, context: object
    ) -> router_pb2.RemoveModelReply:
        raise Conflict("deployment 'arith' names it")

    async def RegisterModel(
        self, request: store_pb2.RegisterModelRequest, context: object
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        yield store_pb2.RegisterProgress(name=request.name, phase="convert")
        raise InvalidRequest("only a pickle is there", param="path")


def end_of(choice: int) -> router_pb2.GenerateEnd:
    return router_pb2.GenerateEnd(
        choice=choice,
        finish=common_pb2.FINISH_REASON_STOP,
        model="large",
        stages=[
            router_pb2.StageReport(
                model="small",
                certainty=common_pb2.Certainty(measure="min_margin", value=0.25),
                threshold=0.5,
                epochs=1,
            ),
            router_pb2.StageReport(model="large", epochs=2, accepted=True, cached_tokens=2),
        ],
        usage=router_pb2.Usage(
            prompt_tokens=3, completion_tokens=2, cost_flops=12.5, cached_tokens=2
        ),
    )


async def start(router: ScriptedRouter) -> GrpcServer:
    return await start_server(
        "127.0.0.1:0",
        lambda server: router_pb2_grpc.add_RouterServicer_to_server(router, server),
        ["gearfall.v1.Router"],
    )


@pytest.fixture
async def router() -> ScriptedRouter:
    return ScriptedRouter()  # type: ignore[abstract]


@pytest.fixture
async def client(router: ScriptedRouter) -> AsyncIterator[AsyncClient]:
    server = await start(router)
    async with AsyncClient(server.address) as opened:
        yield opened
    await server.stop(0)


async def test_an_answer_carries_text_model_stages_and_cost(client: AsyncClient) -> None:
    answer = await client.generate("arith", "40+2=", n=2, logprobs=True)
    assert (answer.request_id, answer.seed, answer.text, answer.model) == ("r1", 7, "42", "large")
    assert len(answer.choices) == 2
    choice = answer.choices[1]
    assert choice.finish is FinishReason.STOP
    assert [(s.model, s.certainty, s.epochs, s.is_accepted) for s in choice.stages] == [
        ("small", 0.25, 1, False),
        ("large", None, 2, True),
    ]
    assert choice.usage.cost_flops == 12.5
    assert [report.cached_tokens for report in choice.stages] == [0, 2]
    assert choice.usage.cached_tokens == 2
    assert [item.token for item in choice.logprobs] == ["4", "2"]


async def test_a_stream_gives_every_event_in_order(client: AsyncClient) -> None:
    kinds = [type(event) async for event in client.stream("arith", "40+2=")]
    assert kinds == [Started, Waiting, TextDelta, TextDelta, Finished]


async def test_closing_a_stream_cancels_the_call(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    stream = client.stream("endless", "1")
    async for event in stream:
        if isinstance(event, TextDelta):
            break
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(router.cancelled.wait(), 5)


async def test_cancelling_whoever_waits_for_an_answer_cancels_the_call(
    client: AsyncClient, router: ScriptedRouter
) -> None:
    waiting = asyncio.create_task(client.generate("endless", "1"))
    await asyncio.wait_for(router.waits.wait(), 5)
    waiting.cancel()
    await asyncio.wait_for(router.cancelled.wait(), 5)


async def test_a_torn_stream_is_an_error_not_a_short_answer(client: AsyncClient) -> None:
    with pytest.raises(Internal):
        await client.generate("torn", "1")


async def test_errors_come_back_typed(client: AsyncClient) -> None:
    with pytest.raises(NotFound, match="no model"):
        await client.generate("unknown", "1")
    with pytest.raises(Conflict, match="arith"):
        await client.remove_model("small")
    with pytest.raises(InvalidRequest) as caught:
        _ = [item async for item in client.register_model("m", "/x")]
    assert caught.value.param == "path"


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("text", "text"), ([1, 2], "tokens"), ([{"role": "user", "content": "x"}], "chat")],
)
async def test_every_kind_of_prompt_reaches_the_router(
    client: AsyncClient, router: ScriptedRouter, prompt: str, field: str
) -> None:
    await client.generate("arith", prompt, priority=Priority.BATCH, temperature=0.0)
    request = router.requests[-1]
    assert request.WhichOneof("prompt") == field
    assert request.priority == common_pb2.PRIORITY_BATCH
    assert request.HasField("temperature")
    assert not request.HasField("top_p")


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([1, "x"], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": "x"}, "y"], {}),
        ("x", {"n": "many"}),
        ("x", {"seed": -1}),
        ("x", {"stop": 7}),
    ],
)
async def test_a_wrong_type_is_refused_before_it_is_sent(
    client: AsyncClient, router: ScriptedRouter, prompt: str, options: dict[str, int]
) -> None:
    with pytest.raises(InvalidRequest):
        await client.generate("arith", prompt, **options)  # type: ignore[arg-type]
    assert router.requests == []


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
async def test_one_stop_string_is_one(
    client: AsyncClient, router: ScriptedRouter, stop: str | Sequence[str]
) -> None:
    await client.generate("arith", "x", stop=stop)
    assert list(router.requests[-1].stop) == ["end"]


async def test_a_deployment_comes_back_equal(client: AsyncClient) -> None:
    record = DeploymentRecord(
        DeploymentName("arith"), (Stage(ModelName("a"), 0.0), Stage(ModelName("b"))), max_replicas=2
    )
    assert await client.deploy(record) == record


@pytest.fixture
def address() -> Iterator[str]:
    """A scripted router on a loop in a thread of its own, for the blocking client."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def open_server() -> GrpcServer:
        return await start(ScriptedRouter())  # type: ignore[abstract]

    server = asyncio.run_coroutine_threadsafe(open_server(), loop).result(10)
    yield server.address
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_blocking_client_does_the_same(address: str) -> None:
    with Client(address) as client:
        assert client.generate("arith", "40+2=").text == "42"
        kinds = [type(event) for event in client.stream("arith", "40+2=")]
        assert kinds == [Started, Waiting, TextDelta, TextDelta, Finished]
        for event in client.stream("endless", "1"):
            if isinstance(event, TextDelta):
                break
        with pytest.raises(NotFound):
            client.generate("unknown", "1")
        with pytest.raises(InvalidRequest):
            list(client.register_model("m", "/x"))
        left = client.stream("endless", "1")
        next(left)
    client.close()
    left.close()  # type: ignore[attr-defined]
    with pytest.raises(Unavailable, match="closed"):
        client.generate("arith", "40+2=")


async def test_a_router_that_is_not_there_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(Exception, match="connect") as caught:
            await client.models()
    assert type(caught.value).__name__ == "Unavailable"
    assert not isinstance(caught.value, grpc.aio.AioRpcError)
