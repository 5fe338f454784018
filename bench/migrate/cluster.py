"""The cluster of `bench.migrate`: two workers, a random Llama, and streams with a clock."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from gearfall.client import AsyncClient, Started, TextDelta
from gearfall.core.errors import NotFound
from gearfall.core.ids import DeploymentName, JobId, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.pb import common_pb2

MODEL = ModelName("bench-llama")
VOCABULARY = 49_152
ANSWER_TOKENS = 2048
"""Room behind the longest prompt: an answer outlasts its move."""
_SLOTS = 10
_SEED = 135
_READY_S = 300.0
_LOOK_AGAIN_S = 0.005
_TOGETHER_S = 0.003
"""Messages of one step come within this."""


def write_model(directory: Path, context_tokens: int, *, layers: int = 30) -> None:
    """Write a random bfloat16 Llama of SmolLM-135M's shape, and a tokenizer of as many words."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.08,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))


class Stream:
    """One request on its way and when its messages came."""

    def __init__(self, client: AsyncClient, prompt: Sequence[int], max_tokens: int) -> None:
        self.times_s: list[float] = []
        """Of each message with tokens, monotonic."""
        self.request_id = ""
        self._tokens = 0
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._read(client, prompt, max_tokens))

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._task.done()

    async def wait_tokens(self, count: int) -> None:
        """Return once so many tokens have come; raise what ended the stream before."""
        while self._tokens < count:
            if self._task.done():
                self._task.result()
                raise NotFound(f"the answer ended after {self._tokens} tokens")
            self._came.clear()
            waits = {asyncio.ensure_future(self._came.wait()), self._task}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    @property
    def tokens(self) -> int:
        """Tokens that have come."""
        return self._tokens

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Return the times between messages, of those that came in [start_s, end_s)."""
        pairs = itertools.pairwise(self.times_s)
        return [later - earlier for earlier, later in pairs if start_s <= later < end_s]

    def resumed_s(self, heard_s: float) -> float:
        """Return when it went on at its new worker, whose first token was heard of at `heard_s`.

        That is where its longest gap ended, of those that did so within a few messages of then.
        """
        near = sorted(range(1, len(self.times_s)), key=lambda at: abs(self.times_s[at] - heard_s))
        at = max(near[:4], key=lambda at: self.times_s[at] - self.times_s[at - 1])
        return self.times_s[at] - _TOGETHER_S

    async def stop(self) -> None:
        """Cancel the request."""
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _read(self, client: AsyncClient, prompt: Sequence[int], max_tokens: int) -> None:
        events = client.stream(
            MODEL, prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=True
        )
        async with contextlib.aclosing(events) as opened:  # type: ignore[type-var]
            async for event in opened:
                if isinstance(event, Started):
                    self.request_id = event.request_id
                elif isinstance(event, TextDelta) and event.logprobs:
                    self.times_s.append(time.perf_counter())
                    self._tokens += len(event.logprobs)
                self._came.set()


class Pair:
    """Two workers that serve the model; requests are measured on the first."""

    def __init__(self, client: AsyncClient, doors: Sequence[WorkerDoor]) -> None:
        self.client = client
        self.source, self.target = doors

    async def start_on(
        self, door: WorkerDoor, prompt: Sequence[int], max_tokens: int
    ) -> Stream | None:
        """Start a request; None, and nothing left of it, when the other worker claimed it."""
        stream = Stream(self.client, prompt, max_tokens)
        if await self.find(stream) is door:
            return stream
        await stream.stop()
        return None

    async def find(self, stream: Stream) -> WorkerDoor:
        """Return the worker that has a request, once one has."""
        while not stream.is_over:
            for door in (self.source, self.target):
                if await self.job_of(stream, door):
                    return door
            await asyncio.sleep(_LOOK_AGAIN_S)
        await stream.wait_tokens(1 << 30)
        raise AssertionError("unreachable")

    async def job_of(self, stream: Stream, door: WorkerDoor) -> JobId | None:
        """Return the job of a request on a worker, None when it is not there."""
        for job in (await door.status()).jobs:
            if stream.request_id and job.request_id == stream.request_id:
                return JobId(job.job_id)
        return None


@contextlib.asynccontextmanager
async def running_pair(home: Path, model: Path, threads: int) -> AsyncIterator[Pair]:
    """Start a local cluster of two workers that both serve `model`."""
    settings = LocalClusterSettings(
        runtime_dir=home / "run",
        data_dir=home / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        workers_per_node=2,
        dram_bytes=2**30,
        slots=_SLOTS,
        threads=threads,
        log_level="WARNING",
    )
    cluster = LocalCluster(settings)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
        async for _ in client.register_model(MODEL, str(model)):
            pass
        name, stages = DeploymentName("bench-pair"), (Stage(MODEL),)
        await client.deploy(DeploymentRecord(name, stages, min_replicas=2, max_replicas=2))
        async with asyncio.timeout(_READY_S):
            addresses = await _ready_addresses(client)
        doors = [await stack.enter_async_context(WorkerDoor(each)) for each in addresses]
        yield Pair(client, doors)


async def _ready_addresses(client: AsyncClient) -> list[str]:
    """Return both workers' addresses once each serves the model."""
    while True:
        found = [
            worker.address
            for worker in (await client.status()).workers
            for replica in worker.replicas
            if (replica.model, replica.state) == (MODEL, common_pb2.REPLICA_STATE_READY)
        ]
        if len(found) == 2:
            return found
        await asyncio.sleep(_LOOK_AGAIN_S)
