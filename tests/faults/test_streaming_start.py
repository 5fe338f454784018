"""Engines that start while their model is loaded: never ready before the last byte is verified."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.core.generation.canary import Canary
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName
from gearfall.core.records import ModelRecord
from gearfall.infra.memory.attach_protocol import FillNews, pack_frame
from gearfall.infra.memory.pool_lease import take_lease
from gearfall.infra.state.memory_state import MemoryStateServer
from services.store.models.canary_process import CanaryRequest
from services.store.models.canary_reference import compute_canary
from services.store.models.model_registry import record_of
from services.worker.engine_link.messages import ProbeEngine, StartEngine, SubmitJob
from services.worker.ports import EngineProcess
from services.worker.processes.zygote_client import Zygote
from services.worker.replicas.replica_start import (
    HeldModel,
    ReplicaSettings,
    StartPorts,
    fetching,
    leased,
    ready,
    spawned,
)
from services.worker.replicas.start_clock import StartClock
from services.worker.store_client import GrpcStoreClient
from tests.services.store.held_reads import HeldReads
from tests.services.store.stores import RunningStore, running_store
from tests.services.store.turnstile import Turnstile
from tests.services.worker.fakes import NODE, WORKER

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

MODEL = ModelName("m")
SETTINGS = ReplicaSettings(WORKER, NODE, "cpu", 2, 1)
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=128,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
)
"""24 MiB: six chunks, so that one can be verified and another not."""


async def canary_here(request: CanaryRequest, size_bytes: int) -> Canary:
    return await asyncio.to_thread(compute_canary, request)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def zygote():
    zygote = Zygote()
    await zygote.start()
    yield zygote
    await zygote.stop()
    zygote.check()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def registered(tmp_path_factory):
    """The data directory of a store that has the model and its canary."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("registered")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(CONFIG).bfloat16()
        model.save_pretrained(directory / "source")
    async with running_store(directory / "data", compute_canary=canary_here) as store:
        await store.register(MODEL, directory / "source")
        await store.service.read_canary(MODEL)
    return directory / "data"


@contextlib.asynccontextmanager
async def held_store(
    registered: Path, directory: Path
) -> AsyncIterator[tuple[RunningStore, HeldReads]]:
    shutil.copytree(registered, directory, ignore=shutil.ignore_patterns("attach"))
    reads = HeldReads()
    async with running_store(directory, read=reads) as store:
        try:
            yield store, reads
        finally:
            reads.may_go_on.set()


@contextlib.asynccontextmanager
async def engine_of(
    record: ModelRecord, address: str, zygote: Zygote, *expected: SubmitJob
) -> AsyncIterator[tuple[EngineProcess, HeldModel, StartClock]]:
    """Start an engine as a replica does, up to where it waits to be ready."""
    ports = StartPorts(GrpcStoreClient(lambda: address), take_lease, zygote)
    clock = StartClock(time.monotonic())
    async with (
        fetching(record, ports.store) as fetch,
        leased(record, SETTINGS, ports, clock) as held,
        spawned(
            record, SETTINGS, ports, held, await fetch, clock=clock, expected=expected
        ) as engine,
    ):
        yield engine, held, clock


async def canary_runs(engine: EngineProcess, held: HeldModel) -> None:
    """Return once the engine has read of the partition, which only its canary does."""
    size_bytes = os.fstat(held.lease.partition_fds[0]).st_size
    async with asyncio.timeout(20):
        while not resident_kib(engine.pid, size_bytes):  # noqa: ASYNC110 (the kernel tells nobody)
            await asyncio.sleep(0.002)


def resident_kib(pid: int, mapping_bytes: int) -> int:
    """Return how much of its mapping of that size a process has touched."""
    pages_bytes = -(-mapping_bytes // os.sysconf("SC_PAGESIZE")) * os.sysconf("SC_PAGESIZE")
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    for first, last, rest in re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) rw-p (.*(?:\n[A-Z].*)*)", smaps, re.MULTILINE
    ):
        if int(last, 16) - int(first, 16) == pages_bytes:
            return int(re.search(r"^Rss: +(\d+)", rest, re.MULTILINE)[1])  # type: ignore[index]
    return 0


def record(store: RunningStore) -> ModelRecord:
    return record_of(store.service.ssd.get(MODEL), (NODE,))


JOB = SubmitJob(
    JobId("a"),
    Epoch(1),
    prompt_token_ids=(5, 9, 1),
    generated_token_ids=(),
    sampling=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
)


async def answer(engine: EngineProcess) -> list[int]:
    engine.send(JOB)
    tokens: list[int] = []
    async for step in engine:
        for run in step.runs:
            tokens += run.token_ids
            if run.finish:
                return tokens
    raise AssertionError("the engine ended")


async def test_an_engine_is_ready_when_the_last_byte_is_verified_and_answers_the_same(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    async with held_store(registered, tmp_path / "data") as (store, reads):
        address = store.service.address
        async with engine_of(record(store), address, zygote) as (engine, held, clock):
            readying = asyncio.ensure_future(ready(engine, held))
            assert held.lease.news_fd is not None
            await canary_runs(engine, held)
            assert not held.loading.done()
            assert not readying.done()
            reads.may_go_on.set()
            found = await readying
            timeline = clock.finish(time.monotonic(), found)
            # It was built beside the load: what is left is the canary's end.
            assert timeline.build_s <= found.build_s
            assert sum(spent for _, spent in timeline.phases()) <= timeline.total_s + 1e-6
            while_loading = await answer(engine)
        async with engine_of(record(store), address, zygote) as (engine, held, _):
            assert held.lease.news_fd is None
            await ready(engine, held)
            assert await answer(engine) == while_loading


async def test_what_rode_along_is_said_once_all_is_verified_and_asked_for(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    async with held_store(registered, tmp_path / "data") as (store, reads):
        address = store.service.address
        async with engine_of(record(store), address, zygote, JOB) as (engine, held, _):
            await canary_runs(engine, held)
            steps = aiter(engine)
            said = asyncio.ensure_future(anext(steps))
            reads.may_go_on.set()
            await ready(engine, held)
            engine.send(ProbeEngine())
            assert not (await said).runs
            engine.send(JOB)
            first = await anext(steps)
            assert first.step_s == 0.0
            tokens = [token for run in first.runs for token in run.token_ids]
            assert len(tokens) == 1
        async with engine_of(record(store), address, zygote) as (engine, held, _):
            await ready(engine, held)
            assert (await answer(engine))[:1] == tokens


async def test_an_engine_computes_behind_bytes_that_come_from_a_neighbour(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    server = MemoryStateServer()
    shutil.copytree(registered, tmp_path / "one", ignore=shutil.ignore_patterns("attach"))
    async with (
        running_store(tmp_path / "one", node="node-1", server=server) as one,
        running_store(tmp_path / "two", node="node-2", server=server) as two,
    ):
        await two.wait_model(MODEL, ("node-1",))
        two.service.load(MODEL)
        (load,) = two.service.loader._loads.values()
        load.may_go_on = turnstile = Turnstile(1)
        address = two.service.address
        async with engine_of(record(one), address, zygote) as (engine, held, _):
            assert held.lease.news_fd is not None
            await canary_runs(engine, held)
            assert not held.loading.done()
            turnstile.is_open.set()
            await ready(engine, held)
            assert (await held.loading).timeline.remote_s > 0
            behind = await answer(engine)
        async with engine_of(record(two), address, zygote) as (engine, held, _):
            assert held.lease.news_fd is None
            await ready(engine, held)
            assert await answer(engine) == behind


async def test_verified_bytes_alone_make_no_engine_ready(registered: Path, zygote: Zygote):
    model = registered / "models" / MODEL
    start = StartEngine(
        model=MODEL,
        manifest_json=(model / "manifest.json").read_bytes(),
        config_json=(model / "config.json").read_bytes(),
        generation_config_json=b"",
        device="cpu",
        threads=1,
        slots=2,
        kv_tokens=64,
        canary_json=(model / "canary.json").read_bytes(),
        is_loading=True,
    )
    ours, theirs = socket.socketpair()
    with ours, (model / "partition-0.bin").open("rb") as partition:
        with theirs:
            engine = await zygote.spawn(start, [partition.fileno(), theirs.fileno()])
        size_bytes = os.fstat(partition.fileno()).st_size
        ours.sendall(pack_frame(FillNews((size_bytes,))))
    with pytest.raises(Unavailable, match="went away"):
        await engine.ready()
    await engine.wait_exit()


async def test_a_corrupt_chunk_that_is_found_while_the_canary_runs(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    async with held_store(registered, tmp_path / "data") as (store, reads):
        partition = tmp_path / "data/models" / MODEL / "partition-0.bin"
        content = bytearray(partition.read_bytes())
        content[-1000] ^= 0x10
        partition.write_bytes(content)
        address = store.service.address
        async with engine_of(record(store), address, zygote, JOB) as (engine, held, _):
            await canary_runs(engine, held)
            engine.send(JOB)
            reads.may_go_on.set()
            with pytest.raises(CorruptCheckpoint, match="is not what was expected"):
                await ready(engine, held)
            with pytest.raises(CorruptCheckpoint, match="is not what was expected"):
                await engine.ready()
            await engine.wait_exit()
            assert [step async for step in engine] == []
        assert store.service.pool.used_bytes == 0
        assert MODEL in store.service.ssd.broken


async def test_a_load_that_gives_way_ends_the_start_and_a_later_one_succeeds(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    async with held_store(registered, tmp_path / "data") as (store, reads):
        async with engine_of(record(store), store.service.address, zygote) as (engine, held, _):
            await canary_runs(engine, held)
            (load,) = store.service.loader._loads.values()
            load.gives_up.set()
            reads.may_go_on.set()
            with pytest.raises(Unavailable, match="gave way"):
                await engine.ready()
            await engine.wait_exit()
            assert (await held.loading).digest  # the load itself starts over
        async with engine_of(record(store), store.service.address, zygote) as (engine, held, _):
            await ready(engine, held)
            assert len(await answer(engine)) == 6


async def test_an_engine_that_dies_while_its_model_is_loaded_leaves_the_load_alone(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    async with held_store(registered, tmp_path / "data") as (store, reads):
        async with engine_of(record(store), store.service.address, zygote) as (engine, held, _):
            await canary_runs(engine, held)
            engine.kill()
            with pytest.raises(Unavailable, match="SIGKILL"):
                await ready(engine, held)
        reads.may_go_on.set()
        assert (await store.load(MODEL))[-1].done
        store.service.pool.check()


async def test_a_store_that_is_killed_ends_the_engine_that_was_waiting_for_it(
    registered: Path, tmp_path: Path, zygote: Zygote
):
    shutil.copytree(registered, tmp_path / "data", ignore=shutil.ignore_patterns("attach"))
    async with running_store(tmp_path / "data") as store:
        model = record(store)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.held_store", str(tmp_path / "data"), MODEL),
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        address = json.loads(await process.stdout.readline())["address"]
        async with engine_of(model, address, zygote) as (engine, held, _):
            await canary_runs(engine, held)
            process.kill()
            with pytest.raises(Unavailable, match="went away"):
                await engine.ready()
            with pytest.raises(Unavailable):
                await held.loading
            await engine.wait_exit()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
