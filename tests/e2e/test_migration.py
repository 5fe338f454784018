"""A long answer moves between two workers while it is streamed: text and ids stay the same."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from google.protobuf.json_format import ParseDict
from transformers import LlamaConfig, LlamaForCausalLM

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.demo import catalogue
from gearfall.infra.failpoints import DIRECTORY_VARIABLE, RULES_VARIABLE
from gearfall.infra.net.bearer import SECRET_VARIABLE
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.pb import common_pb2
from gearfall.pb import worker_pb2 as pb
from gearfall.pb.worker_pb2_grpc import WorkerStub
from tests.cluster_host import ClusterHost
from tests.services.worker.tiny_adapters import save_adapter

MODEL = "wanderer"
ADAPTER = "wanderer-tuned"
SECRET = "between the services"
PROMPT_IDS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 6
TOKENS = 500
PACE = "engine.decode=delay:0.004"
"""Slows every token down, so that a client notices when it is time for the next move."""
HOLD = "engine.decode=delay:0.05"
"""While a job is being moved: its answer is still on its way then on however busy a machine."""
Move = tuple[int, "pb.MigrationPath.ValueType"]
BY_TOKENS, BY_KV = pb.MIGRATION_PATH_TOKENS, pb.MIGRATION_PATH_KV
MOVES: tuple[Move, ...] = ((20, BY_TOKENS), (60, BY_KV), (100, BY_TOKENS), (140, BY_KV))


async def _as_it_is(address: str) -> str:
    return address


class OnePort:
    """Another host, of whose ports a firewall lets through only those that are named."""

    HOST = "127.0.0.2"

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []

    async def let_through(self, address: str) -> str:
        """Return where a worker's gRPC port, and no other of its ports, can be reached."""
        host, _, port = address.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(host, int(port))
            await asyncio.gather(_copy(reader, back), _copy(there, writer))

        server = await asyncio.start_server(serve, self.HOST, 0)
        self._servers.append(server)
        return f"{self.HOST}:{server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        for server in self._servers:
            server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()


class Pair:
    """Two workers that serve the model, and a client."""

    def __init__(self, client: AsyncClient, host: ClusterHost) -> None:
        self.client = client
        self.host = host
        self.addresses: dict[str, str] = {}
        self.known_at: Callable[[str], Awaitable[str]] = _as_it_is

    async def ready(self) -> None:
        """Return when both workers serve the model."""
        async with asyncio.timeout(60):
            while len(self.addresses) < 2:
                for worker in (await self.client.status()).workers:
                    for replica in worker.replicas:
                        if replica.state == common_pb2.REPLICA_STATE_READY:
                            self.addresses[worker.worker_id] = worker.address

    async def find_busy(self) -> str:
        """Return the address of a worker that runs jobs."""
        async with asyncio.timeout(30):
            while True:
                for address in self.addresses.values():
                    async with open_channel(address) as channel:
                        stub = WorkerStub(channel)
                        status = await stub.GetStatus(pb.WorkerStatusRequest(), timeout=10)
                        if any(job.next_index > 0 for job in status.jobs):
                            return address

    async def move(self, path: pb.MigrationPath.ValueType) -> pb.MigrateJobReply:
        """Move the only job to a worker that it is not on, by the address that it is known at."""
        with self.slowly():
            return await self._move(path)

    @contextlib.contextmanager
    def slowly(self) -> Iterator[None]:
        """Hold all answers back."""
        self.host.arm(HOLD)
        try:
            yield
        finally:
            self.host.arm()

    async def _move(self, path: pb.MigrationPath.ValueType) -> pb.MigrateJobReply:
        for worker_id, address in self.addresses.items():
            async with open_channel(address) as channel:
                stub = WorkerStub(channel)
                jobs = (await stub.GetStatus(pb.WorkerStatusRequest(), timeout=10)).jobs
                if not jobs:
                    continue
                (job,) = jobs
                (other,) = (a for w, a in self.addresses.items() if w != worker_id)
                target = await self.known_at(other)
                request = pb.MigrateJobRequest(
                    job_id=job.job_id, epoch=job.epoch, target_address=target, path=path
                )
                reply: pb.MigrateJobReply = await stub.MigrateJob(request, timeout=30)
                return reply
        raise AssertionError("the job runs nowhere")

    async def read(
        self, moves: tuple[Move, ...], options: Options, model: str = MODEL
    ) -> tuple[list[int], str, int, list[pb.MigrateJobReply]]:
        """Return token ids, text, owners and what the moves said."""
        ids: list[int] = []
        text, owners, replies = "", 0, []
        waits = list(moves)
        moving: asyncio.Task[pb.MigrateJobReply] | None = None
        async for event in self.client.stream(model, PROMPT_IDS, **options):
            if isinstance(event, TextDelta):
                text += event.text
                ids += [item.token_id for item in event.logprobs]
                if waits and len(ids) >= waits[0][0] and (moving is None or moving.done()):
                    if moving is not None:
                        replies.append(moving.result())
                    moving = asyncio.create_task(self.move(waits.pop(0)[1]))
            elif isinstance(event, Finished):
                owners = event.stages[-1].epochs
        if moving is not None:
            replies.append(await moving)
        return ids, text, owners, replies


def wanderer() -> LlamaForCausalLM:
    """A model whose answers neither end nor repeat, slow enough to be met on its way."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=18, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            bos_token_id=0, eos_token_id=1, initializer_range=0.1,
        )
    )  # fmt: skip
    stored: LlamaForCausalLM = model.bfloat16().eval()
    return stored


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ClusterHost, Path]]:
    folder = tmp_path_factory.mktemp("pair")
    wanderer().save_pretrained(folder / "source")
    save_adapter(wanderer(), ("q_proj", "down_proj"), folder / "adapter", seed=1, size=0.05)
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", folder / "source")
    points = tmp_path_factory.mktemp("points")
    environment = {RULES_VARIABLE: PACE, DIRECTORY_VARIABLE: str(points), SECRET_VARIABLE: SECRET}
    host = ClusterHost(folder / "home", "--workers-per-node", "2", environment=environment)
    yield host, folder / "source"
    logs = [Path(facts.log) for facts in host.facts.services if facts.service == "worker"]
    assert host.stop() == 0
    lines = [line for log in logs for line in log.read_text().splitlines() if "asyncio" in line]
    assert lines == [], "a task that nobody waited for"


@pytest.fixture
async def pair(two_workers: tuple[ClusterHost, Path]) -> AsyncIterator[Pair]:
    host, source = two_workers
    async with AsyncClient(host.addresses["grpc"]) as client:
        _ = [item async for item in client.register_model(MODEL, str(source))]
        adapter = client.register_model(ADAPTER, str(source.with_name("adapter")), base=MODEL)
        _ = [item async for item in adapter]
        stages = (Stage(ModelName(MODEL)),)
        await client.deploy(
            DeploymentRecord(DeploymentName("pair"), stages, min_replicas=2, max_replicas=2)
        )
        opened = Pair(client, host)
        await opened.ready()
        yield opened


GREEDY = Options(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=True)
SAMPLED = Options(temperature=1.0, seed=11, max_tokens=TOKENS, ignore_eos=True, logprobs=True)


@pytest.mark.parametrize(
    ("model", "options"),
    [(MODEL, GREEDY), (MODEL, SAMPLED), (ADAPTER, GREEDY)],
    ids=["greedy", "sampled", "adapter"],
)
async def test_an_answer_moved_four_times_is_the_undisturbed_one(
    pair: Pair, model: str, options: Options
) -> None:
    expected_ids, expected_text, owners, _ = await pair.read((), options, model)
    assert (len(expected_ids), owners) == (TOKENS, 1)
    ids, text, owners, replies = await pair.read(MOVES, options, model)
    assert (ids, text) == (expected_ids, expected_text)
    assert owners == 1 + len(MOVES)
    assert [reply.epoch for reply in replies] == [2, 3, 4, 5]
    assert [reply.path for reply in replies] == [path for _, path in MOVES]
    assert [reply.moved_bytes > 0 for reply in replies] == [path == BY_KV for _, path in MOVES]


async def test_keys_and_values_go_over_grpc_where_their_socket_cannot_be_connected(
    pair: Pair,
) -> None:
    options = Options(temperature=1.0, seed=7, max_tokens=200, ignore_eos=True, logprobs=True)
    expected_ids, *_ = await pair.read((), options)
    firewall = OnePort()
    pair.known_at = firewall.let_through
    try:
        ids, _, owners, replies = await pair.read(((40, BY_KV), (90, BY_KV)), options)
    finally:
        firewall.close()
    assert ids == expected_ids
    assert owners == 3
    assert [reply.path for reply in replies] == [pb.MIGRATION_PATH_KV_STREAM] * 2
    assert all(reply.moved_bytes > 0 for reply in replies)


async def drain_by_notice(host: ClusterHost, address: str) -> pb.DrainReply:
    """Tell a worker over HTTP that its machine goes, as a handler of spot notices does."""
    (door,) = (each.metrics for each in host.facts.services if each.address == address)
    async with httpx.AsyncClient(timeout=40) as client:
        reply = await client.post(
            f"http://{door}/drain?deadline_s=20", headers={"Authorization": f"Bearer {SECRET}"}
        )
    assert reply.status_code == 200, reply.text
    return ParseDict(reply.json(), pb.DrainReply())


async def test_a_drained_worker_moves_its_jobs_before_it_goes(
    two_workers: tuple[ClusterHost, Path], pair: Pair
) -> None:
    """The last test: one of the two workers is gone afterwards."""
    expected_ids, *_ = await pair.read((), GREEDY)
    with pair.slowly():
        reading = [asyncio.create_task(pair.read((), GREEDY)) for _ in range(4)]
        drained = await drain_by_notice(two_workers[0], await pair.find_busy())
    read = [await each for each in reading]
    assert all(ids == expected_ids for ids, *_ in read)
    assert drained.migrated_jobs >= 1, drained
    assert list(drained.lost_job_ids) == []
    assert drained.migrated_jobs + drained.finished_jobs <= 4
    moved = [each for each in drained.migrations if not each.error]
    assert len(moved) == drained.migrated_jobs
    assert sum(owners for _, _, owners, _ in read) == 4 + drained.migrated_jobs
