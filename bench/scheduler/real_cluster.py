"""The cluster of `bench.scheduler real` and `calibrate`: three nodes, each with a slow disk.

Stores, workers, router, etcd and Redis stay; a scheduler with another policy takes over for each
run, and every run begins with nothing in memory.
"""

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bench.load.model import VOCABULARY, llama_shapes, write_llama
from bench.scheduler.starts_cluster import environment
from gearfall.client import AsyncClient, TextDelta
from gearfall.core.ids import ModelName
from gearfall.core.records import NodeRecord
from gearfall.infra.local.launcher import (
    LocalCluster,
    LocalClusterSettings,
    service_commands,
)
from gearfall.infra.local.supervised_process import ProcessSpec, SupervisedProcess
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub
from gearfall.simulation.requests import Request

if TYPE_CHECKING:
    from gearfall.pb.store_pb2_grpc import StoreAsyncStub

_WAIT_S = 60.0
_FIRST_WORD = 5
_CONTEXT_TOKENS = 8192
_PROBED_WORDS = itertools.count(7)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cluster is made of."""

    nodes: int = 3
    places: int = 2
    """Models that a worker hosts at once; one worker a node."""
    models: int = 8
    model_bytes: int = 120_000_000
    ssd_bytes_per_s: int = 60_000_000
    dram_models: int = 4
    """That fit into each node's pool, and are there at the beginning."""
    slots: int = 4
    keep_alive_s: float = 4.0

    @property
    def names(self) -> tuple[ModelName, ...]:
        """Of the models, the most popular first."""
        return tuple(ModelName(f"model-{number}") for number in range(self.models))

    @property
    def file_bytes(self) -> int:
        """Of one model, as it is written: `model_bytes` in whole layers."""
        return sum(2 * math.prod(shape) for shape in llama_shapes(self.model_bytes).values())

    @property
    def load_s(self) -> float:
        """What a throttled disk takes for one model."""
        return self.file_bytes / self.ssd_bytes_per_s

    @property
    def pool_bytes(self) -> int:
        """Of each node's memory."""
        return int(self.file_bytes * (self.dram_models + 0.5))

    def filled(self, node: int) -> tuple[ModelName, ...]:
        """Return what a node's memory holds when it is full: its own part, then the next ones'."""
        parts = (self.names[(node + step) % self.nodes :: self.nodes] for step in range(self.nodes))
        return tuple(name for part in parts for name in part)[: self.dram_models]


@dataclass(frozen=True, slots=True)
class Answer:
    """One request, timed at the client from the moment when the trace has it come."""

    number: int
    model: str
    at_s: float
    first_token_s: float
    total_s: float


class RealSite:
    """A running cluster without a scheduler."""

    def __init__(
        self,
        client: AsyncClient,
        cluster: Cluster,
        stores: "Sequence[StoreAsyncStub]",
        settings: LocalClusterSettings,
        shape: Shape,
    ) -> None:
        self.client, self.cluster = client, cluster
        self.models = shape.names
        self._stores, self._settings, self._shape = stores, settings, shape

    @contextlib.asynccontextmanager
    async def scheduled_by(self, policy: str) -> AsyncIterator[None]:
        """Have a scheduler with this policy lead."""
        (spec,) = service_commands(replace(self._settings, policy=policy))[2]
        scheduler = SupervisedProcess(spec)
        await scheduler.start()
        try:
            yield
        finally:
            await scheduler.stop()

    async def empty(self) -> None:
        """Return when no replica is left and nothing is in any node's memory."""
        async with asyncio.timeout(_WAIT_S):
            async for _ in self.cluster.changes():
                if not self.cluster.view.replicas and not self.cluster.view.assignments:
                    break
            for store, node in zip(self._stores, self._nodes(), strict=True):
                for model in node.resident:
                    await store.UnloadModel(store_pb2.UnloadModelRequest(model=model))
            async for _ in self.cluster.changes():
                if not any(node.resident for node in self._nodes()):
                    return

    async def fill(self) -> None:
        """Have each node hold its part of the models in memory, and no others."""
        parts = [self._shape.filled(number) for number in range(len(self._stores))]
        async with asyncio.timeout(_WAIT_S), asyncio.TaskGroup() as tasks:
            for store, part in zip(self._stores, parts, strict=True):
                tasks.create_task(_load_each(store, part))
        async with asyncio.timeout(_WAIT_S):
            async for _ in self.cluster.changes():
                if sum(len(node.resident) for node in self._nodes()) == sum(map(len, parts)):
                    return

    async def probe(self, model: ModelName, prompt_tokens: int, tokens: int) -> tuple[float, float]:
        """Return seconds to the first token and from one token to the next, of one answer."""
        # No prompt twice: what was computed for one before is kept and found again.
        prompt = [next(_PROBED_WORDS) % 30_000 for _ in range(prompt_tokens)]
        sent_s = time.perf_counter()
        times_s: list[float] = []
        events = self.client.stream(
            model, prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=True
        )
        async for event in events:
            if isinstance(event, TextDelta):
                times_s += [time.perf_counter() - sent_s] * len(event.logprobs or ())
        return times_s[0], (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)

    async def replay(self, requests: Sequence[Request]) -> list[Answer]:
        """Send each request when it is due, whatever became of the others."""
        begun_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            sent = [tasks.create_task(self._ask(each, begun_s)) for each in requests]
        return [task.result() for task in sent]

    async def _ask(self, request: Request, begun_s: float) -> Answer:
        due_s = begun_s + request.at_s
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        (work,) = request.stages
        first_s = 0.0
        events = self.client.stream(
            work.model,
            # No two begin alike: nothing of a prompt is found computed.
            [_FIRST_WORD + request.number] * work.prompt_tokens,
            max_tokens=work.output_tokens,
            temperature=0.0,
            ignore_eos=True,
            logprobs=True,
        )
        async with contextlib.aclosing(events) as opened:  # type: ignore[type-var]
            async for event in opened:
                if isinstance(event, TextDelta) and event.logprobs and not first_s:
                    first_s = time.perf_counter() - due_s
        return Answer(
            request.number, work.model, request.at_s, first_s, time.perf_counter() - due_s
        )

    def _nodes(self) -> Sequence[NodeRecord]:
        view = self.cluster.view
        return [view.nodes[name] for name in sorted(view.nodes)]


async def _load_each(store: "StoreAsyncStub", models: Sequence[ModelName]) -> None:
    for model in models:
        request = store_pb2.LoadModelRequest(model=model)
        async for _ in store.LoadModel(request, timeout=_WAIT_S):
            pass


@contextlib.asynccontextmanager
async def running_real_site(home: Path, scratch: Path, shape: Shape) -> AsyncIterator[RealSite]:
    """Start the cluster with all models on every node's disk; `home` keeps the source model."""
    source = _source(home, shape.model_bytes)
    settings = LocalClusterSettings(
        runtime_dir=scratch / "run",
        data_dir=scratch / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        nodes=shape.nodes,
        dram_bytes=shape.pool_bytes,
        max_replicas=shape.places,
        slots=shape.slots,
        keep_alive_s=shape.keep_alive_s,
    )
    limits = {
        "GEARFALL_SSD_BYTES_PER_S_LIMIT": str(shape.ssd_bytes_per_s),
        # What is faulted in ahead is memory of three nodes at once.
        "GEARFALL_SPARE_BYTES": str(shape.file_bytes),
    }
    cluster = LocalCluster(settings, commands=_without_scheduler)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(environment(limits))
        stack.push_async_callback(cluster.stop)
        await cluster.start()
        client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
        for name in shape.names:
            async for _ in client.register_model(name, str(source)):
                pass
        state = EtcdState(cluster.settings.etcd_url)
        stack.push_async_callback(state.close)
        view = Cluster(state)
        await view.start()
        stack.push_async_callback(view.stop)
        stores = []
        for _, node in sorted(view.view.nodes.items()):
            channel = await stack.enter_async_context(open_channel(node.address))
            stores.append(StoreStub(channel))
        yield RealSite(client, view, stores, cluster.settings, shape)


def _without_scheduler(settings: LocalClusterSettings) -> Sequence[Sequence[ProcessSpec]]:
    stores, workers, _, routers = service_commands(settings)
    return (stores, workers, routers)


def _source(home: Path, size_bytes: int) -> Path:
    source = home / f"llama-{size_bytes}"
    if not source.exists():
        write_llama(source, size_bytes)
        config = json.loads((source / "config.json").read_text())
        # Answers as long as several loads from disk have to fit.
        config["max_position_embeddings"] = _CONTEXT_TOKENS
        (source / "config.json").write_text(json.dumps(config, indent=2))
        words = {f"w{number}": number for number in range(VOCABULARY)}
        Tokenizer(WordLevel(words, unk_token="w0")).save(str(source / "tokenizer.json"))
    return source
