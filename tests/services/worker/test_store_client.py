"""The store client against a scripted store over real gRPC."""

from contextlib import AsyncExitStack

import pytest

from gearfall.core.errors import CorruptCheckpoint, GearfallError, Internal, NotFound, Unavailable
from gearfall.core.records import Tier
from gearfall.infra.grpc_server import start_server
from gearfall.pb import common_pb2, store_pb2_grpc
from gearfall.pb import store_pb2 as pb
from services.worker.store_client import GrpcStoreClient
from tests.services.worker.fakes import MODEL


class ScriptedStore(store_pb2_grpc.StoreServicer):
    def __init__(self) -> None:
        self.progress: list[pb.LoadProgress] = []
        self.error: GearfallError | None = None
        self.asked: list[pb.LoadModelRequest] = []
        self.client = GrpcStoreClient(lambda: None)

    async def LoadModel(self, request, context):
        self.asked.append(request)
        for message in self.progress:
            yield message
        if self.error:
            raise self.error

    async def ReadFile(self, request, context):
        if request.file != "config.json":
            raise NotFound(f"no {request.file}")
        return pb.ReadFileReply(content=b"{}")

    async def ReadCanary(self, request, context):
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
