"""The cluster of `bench.scheduler starts`: one node, models of several sizes in chosen tiers."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bench.load.model import VOCABULARY, write_llama
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.client import AsyncClient
from gearfall.core.ids import ModelName
from gearfall.core.ports import KeyPut, WatchItem
from gearfall.core.records import AssignmentRecord, DemandRecord, ReplicaRecord, ReplicaState
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import Record, decode_entry
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.pb import store_pb2
from gearfall.pb.store_pb2_grpc import StoreStub

if TYPE_CHECKING:
    from gearfall.pb.store_pb2_grpc import StoreAsyncStub

PROMPT = (1, 5, 9, 13, 17)
GB = 10**9
_WAIT_S = 60.0
_POLICY = {
    "GEARFALL_MIN_RESIDENCY": "0.1",
    "GEARFALL_RESIDENCY_PER_START": "0",
}
"""A replica goes soon after its request, so that the next start can be measured."""


@dataclass(frozen=True, slots=True)
class MeasuredStart:
    """One cold request."""

    model: str
    size_bytes: int
    tier: str
    """Its bytes' place when the request came."""
    beside: int
    """Other cold requests sent in the same moment."""
    predicted_s: float
    measured_s: float
    """Assignment to readiness, by the replica's timeline."""
    control_plane_s: float
    """From the request's leaving the client until the store has the load in hand."""
    hops: Mapping[str, float]
    """Of the control plane's seconds, by the clocks of the processes, which are one machine's."""
    first_token_s: float
    phases: Mapping[str, float]
    waited_s: float = 0.0
    """Of the measured time, behind other loads."""
    assigned_unix_s: float = 0.0
    reason: str = ""
    """The assignment's, with the terms of its prediction."""
    teaches: bool = False
    """In a round that only teaches."""


class Site:
    """A running cluster and what the bench needs to see and move in it."""

    def __init__(
        self,
        client: AsyncClient,
        cluster: Cluster,
        store: "StoreAsyncStub",
        files: Sequence[Path],
    ) -> None:
        """`files`: directories that hold the models' bytes, on the node and behind URLs."""
        self._client, self._cluster, self._store = client, cluster, store
        self._files = files

    async def start(self, model: ModelName, beside: int = 0) -> MeasuredStart:
        """Send a request to a cold model and return what its start took."""
        record = self._cluster.view.models[model]
        is_watching = asyncio.Event()
        seeing = asyncio.create_task(self._seen(model, is_watching))
        await is_watching.wait()
        sent_unix_s, sent_s = time.time(), time.perf_counter()
        try:
            await self._client.generate(
                model, PROMPT, max_tokens=1, temperature=0.0, ignore_eos=True
            )
            first_token_s = time.perf_counter() - sent_s
            seen = await asyncio.wait_for(seeing, _WAIT_S)
        finally:
            seeing.cancel()
        assignment, timeline = seen.assignment, seen.timeline
        return MeasuredStart(
            model,
            record.size_bytes,
            timeline.from_tier.value,
            beside,
            assignment.predicted_start_s,
            timeline.total_s,
            assignment.assigned_unix_s - sent_unix_s + timeline.queued_s,
            seen.hops(sent_unix_s),
            first_token_s,
            dict(timeline.phases()),
            timeline.waited_s,
            assignment.assigned_unix_s,
            assignment.reason,
        )

    async def wait_gone(self, models: Sequence[ModelName]) -> None:
        """Return once no replica of these is left."""
        async with asyncio.timeout(_WAIT_S):
            async for _ in self._cluster.changes():
                view = self._cluster.view
                if not any(model in models for _, model in (*view.replicas, *view.assignments)):
                    return

    async def drop_from_memory(self, model: ModelName) -> None:
        """Have the store drop a model from DRAM, and the kernel everything from the page cache."""
        forget_pages(self._files)
        if self.tier_of(model) is not Tier.DRAM:
            return
        async with asyncio.timeout(_WAIT_S):
            await self._store.UnloadModel(store_pb2.UnloadModelRequest(model=model))
            async for _ in self._cluster.changes():
                if all(model not in node.resident for node in self._cluster.view.nodes.values()):
                    return

    def tier_of(self, model: ModelName) -> Tier:
        """Return where the node has a model's bytes."""
        (node,) = self._cluster.view.nodes.values()
        if model in node.resident:
            return Tier.DRAM
        return Tier.SSD if model in (node.on_ssd or ()) else Tier.REMOTE

    async def _seen(self, model: ModelName, is_watching: asyncio.Event) -> "_SeenStart":
        """Return the next start of a model that ends, once it has.

        By every write: the view of a busy machine may know of a replica's end with its start.
        """
        demand = assignment = loading = None
        events = self._cluster.state.watch("")
        async with contextlib.aclosing(events) as opened:  # type: ignore[type-var]
            async for item in opened:
                is_watching.set()
                match _record_in(item):
                    case DemandRecord() as record if record.model == model:
                        demand = demand or record
                    case AssignmentRecord() as record if record.model == model:
                        assignment = record
                    case ReplicaRecord() as record if record.model == model and assignment:
                        loading = loading or record
                        if record.state is ReplicaState.READY:
                            return _SeenStart(demand, assignment, loading, record.timeline)
        raise AssertionError("the cluster was stopped")


@dataclass(frozen=True, slots=True)
class _SeenStart:
    """What cluster state was told of a start."""

    demand: DemandRecord | None
    """None for one that no demand had to cause."""
    assignment: AssignmentRecord
    loading: ReplicaRecord
    """As its worker took it up."""
    timeline: StartTimeline

    def hops(self, sent_unix_s: float) -> dict[str, float]:
        """Return the seconds from one to the next; those that were not seen are left out."""
        assigned_unix_s = self.assignment.assigned_unix_s
        hops = {}
        if self.demand is not None:
            hops["client to router"] = self.demand.since_unix_s - sent_unix_s
            hops["router to leader"] = assigned_unix_s - self.demand.since_unix_s
        if self.loading.state is ReplicaState.LOADING:
            taken_s = self.loading.seen_unix_s - assigned_unix_s
            hops["leader to worker"] = taken_s
            hops["worker to store"] = self.timeline.queued_s - taken_s
        return hops


def _record_in(item: WatchItem) -> Record | None:
    kinds = ("demand/", "assignments/", "replicas/")
    if not isinstance(item, KeyPut) or not item.entry.key.startswith(kinds):
        return None
    return decode_entry(item.entry.key, item.entry.value)[2]


def forget_pages(directories: Sequence[Path]) -> None:
    """Drop the files below these directories from the page cache, what is not mapped of them."""
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_file() and path.stat().st_size > 2**20:
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def make_models(home: Path, sizes_gb: Sequence[float]) -> dict[ModelName, Path]:
    """Write a random Llama of each size, once; return their directories by name."""
    found = {}
    for size in sizes_gb:
        name = ModelName(f"near-{size:g}")
        if not (home / name).exists():
            write_llama(home / name, int(size * GB))
            words = {f"w{number}": number for number in range(VOCABULARY)}
            Tokenizer(WordLevel(words, unk_token="w0")).save(str(home / name / "tokenizer.json"))
        found[name] = home / name
    return found


def make_far(home: Path, near: Mapping[ModelName, Path]) -> dict[ModelName, Path]:
    """Convert the models, once, as they would lie below a URL."""
    found = {}
    for name, source in near.items():
        far = ModelName(name.replace("near", "far"))
        incoming = home / f"{far}.incoming"
        if not (home / far).exists():
            incoming.mkdir()
            with open_source(str(source)) as opened:
                convert(opened, incoming, lambda _done, _total: None)
            incoming.rename(home / far)
        found[far] = home / far
    return found


@contextlib.asynccontextmanager
async def running_site(
    home: Path, near: Mapping[ModelName, Path], far: Mapping[ModelName, Path], threads: int
) -> AsyncIterator[Site]:
    """Start a cluster with `near` on its SSD and `far` behind file URLs, one of them at a time."""
    sizes = {name: _size_bytes(path) for name, path in {**near, **far}.items()}
    near_bytes = sum(sizes[name] for name in near)
    far_bytes = max((sizes[name] for name in far), default=0)
    room = near_bytes + far_bytes + 64 * 2**20
    settings = LocalClusterSettings(
        runtime_dir=home / "run",
        data_dir=home / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        dram_bytes=sum(sizes.values()) + 2**30,
        memory_bytes=3 * sum(sizes.values()),
        threads=threads,
        keep_alive_s=0.1,
    )
    with environment({**_POLICY, "GEARFALL_SSD_BYTES": str(room)}):
        cluster = LocalCluster(settings)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(cluster.stop)
            await cluster.start()
            client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
            for name, path in near.items():
                await _register(client, name, str(path))
            for name, path in far.items():
                await _register(client, name, path.as_uri())
            state = EtcdState(cluster.settings.etcd_url)
            stack.push_async_callback(state.close)
            view = Cluster(state)
            await view.start()
            stack.push_async_callback(view.stop)
            (node,) = view.view.nodes.values()
            channel = await stack.enter_async_context(open_channel(node.address))
            # Nothing of etcd's and Redis's: their next write would read its page from disk first.
            files = [home / "data" / node.node_id, *far.values()]
            yield Site(client, view, StoreStub(channel), files)


async def _register(client: AsyncClient, name: ModelName, source: str) -> None:
    async for _ in client.register_model(name, source):
        pass


def _size_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Have these variables set; put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
