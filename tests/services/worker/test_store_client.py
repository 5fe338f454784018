"""The store client against a scripted store over real gRPC."""

import asyncio
import socket
from contextlib import AsyncExitStack

import grpc
import pytest

from gearfall.core.errors import CorruptCheckpoint, GearfallError, Internal, NotFound, Unavailable
from gearfall.core.tiers import Tier
from gearfall.infra.net.grpc_server import start_server
from gearfall.pb import common_pb2, store_pb2_grpc
from gearfall.pb import store_pb2 as pb
from services.worker.store_client import GrpcStoreClient
from tests.services.worker.fakes import MODEL


class ScriptedStore(store_pb2_grpc.StoreServicer):
    def __init__(self) -> None:
        self.progress: list[pb.LoadProgress] = []
        self.error: GearfallError | None = None
        self.asked: list[pb.LoadModelRequest] = []
        self.peers: list[str] = []
        self.is_asked_for_canary, self.may_answer = asyncio.Event(), asyncio.Event()
        self.may_answer.set()
        self.client = GrpcStoreClient(lambda: None)

    async def LoadModel(self, request, context):
        self.asked.append(request)
        self.peers.append(context.peer())
        for message in self.progress:
            yield message
        if self.error:
            raise self.error

    async def ReadFile(self, request, context):
        if request.file != "config.json":
            raise NotFound(f"no {request.file}")
        return pb.ReadFileReply(content=b"{}")

    async def ReadCanary(self, request, context):
        self.is_asked_for_canary.set()
        await self.may_answer.wait()
        return pb.ReadCanaryReply(content=request.model.encode())


@pytest.fixture
async def store():
    async with AsyncExitStack() as stack:
        scripted = ScriptedStore()  # type: ignore[abstract]
        server = await start_server(
            "127.0.0.1:0",
            lambda s: store_pb2_grpc.add_StoreServicer_to_server(scripted, s),
            ("gearfall.v1.Store",),
        )
        stack.push_async_callback(server.stop, 0.0)
        scripted.client = GrpcStoreClient(lambda: server.address)
        stack.push_async_callback(scripted.client.close)
        yield scripted


async def test_a_load_ends_with_where_to_attach(store):
    timeline = common_pb2.StartTimeline(ssd_s=0.5, from_tier=common_pb2.TIER_SSD)
    store.progress = [
        pb.LoadProgress(done_bytes=1, total_bytes=2),
        pb.LoadProgress(done=True, attach_socket="/run/a", digest="d", timeline=timeline),
    ]
    heard: list[str] = []
    loaded = await store.client.load_model(
        MODEL, wanted_unix_s=0.25, on_begun=lambda: heard.append("begun")
    )
    assert heard == ["begun"]
    assert store.asked == [pb.LoadModelRequest(model=MODEL, wanted_unix_s=0.25)]
    assert (loaded.attach_socket, loaded.digest) == ("/run/a", "d")
    assert (loaded.timeline.ssd_s, loaded.timeline.from_tier) == (0.5, Tier.SSD)


async def test_a_failed_load_raises_what_the_store_raised(store):
    store.progress = [pb.LoadProgress(done_bytes=1)]
    store.error = CorruptCheckpoint("chunk 3 differs")
    with pytest.raises(CorruptCheckpoint, match="chunk 3 differs"):
        await store.client.load_model(MODEL)


async def test_a_load_that_ends_early_is_no_load(store):
    store.progress = [pb.LoadProgress(done_bytes=1)]
    with pytest.raises(Internal):
        await store.client.load_model(MODEL)


async def test_files_are_read_or_not_found(store):
    assert await store.client.read_file(MODEL, "config.json") == b"{}"
    with pytest.raises(NotFound):
        await store.client.read_file(MODEL, "other.json")


async def test_no_store_is_said_at_once():
    with pytest.raises(Unavailable):
        await GrpcStoreClient(lambda: None).load_model(MODEL)


async def test_the_canary_is_read_from_the_store(store):
    assert await store.client.read_canary(MODEL) == MODEL.encode()


async def test_one_connection_serves_start_after_start_until_a_call_over_it_fails(store):
    store.progress = [pb.LoadProgress(done=True)]
    for _ in range(2):
        await store.client.load_model(MODEL)
    assert len(set(store.peers)) == 1
    store.error = Unavailable("the store is stopping")
    store.progress = []
    with pytest.raises(Unavailable):
        await store.client.load_model(MODEL)
    store.error, store.progress = None, [pb.LoadProgress(done=True)]
    await store.client.load_model(MODEL)
    assert len(set(store.peers)) == 2


async def test_it_is_connected_before_the_first_call(store):
    await store.client.connect()
    channel = store.client._connection.channel
    async with asyncio.timeout(10):
        while (state := channel.get_state()) is not grpc.ChannelConnectivity.READY:
            await channel.wait_for_state_change(state)
    await GrpcStoreClient(lambda: None).connect()


async def test_a_store_that_listens_later_than_it_is_known_is_found_by_the_first_call():
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{kept.getsockname()[1]}"
        client = GrpcStoreClient(lambda: address)
        await client.connect()
        assert client._connection is not None
        channel = client._connection.channel
        async with asyncio.timeout(10):
            while (state := channel.get_state()) is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                await channel.wait_for_state_change(state)
        store = ScriptedStore()  # type: ignore[abstract]
        server = await start_server(
            address,
            lambda s: store_pb2_grpc.add_StoreServicer_to_server(store, s),
            ("gearfall.v1.Store",),
        )
        assert await client.read_canary(MODEL) == MODEL.encode()
        await client.close()
        await server.stop(0.0)


async def test_a_connection_that_was_left_stays_for_those_who_still_use_it(store):
    """One call fails while another is under way, which ends as if nothing had been."""
    store.may_answer.clear()
    reading = asyncio.create_task(store.client.read_canary(MODEL))
    await store.is_asked_for_canary.wait()
    store.error = Unavailable("not now")
    with pytest.raises(Unavailable):
        await store.client.load_model(MODEL)
    await store.client.close()
    store.may_answer.set()
    assert await reading == MODEL.encode()
