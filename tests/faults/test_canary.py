"""Weights that changed together with their checksums: found by the canary, never served."""

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from gearfall.core.checkpoint.manifest import checksum, manifest_bytes, parse_manifest
from gearfall.core.ports import QueueDepth
from gearfall.core.records import AssignmentRecord, ReplicaRecord, ReplicaState
from gearfall.infra.memory.pool_lease import take_lease
from gearfall.infra.queue.memory_queue import MemoryQueue
from services.store.models.canary_process import CanaryProcess
from services.store.models.model_registry import record_of
from services.worker.jobs.job_board import JobBoard
from services.worker.jobs.push_stream import PushStream
from services.worker.jobs.settlement import Settlement
from services.worker.processes.zygote_client import Zygote
from services.worker.replicas.replica import Replica, ReplicaPorts
from services.worker.replicas.replica_start import ReplicaSettings, StartPorts
from services.worker.store_client import GrpcStoreClient
from tests.services.store.stores import RunningStore, running_store
from tests.services.worker.fakes import MODEL, NODE, WORKER, Watched, job
from tests.services.worker.tiny_checkpoints import random_model

TENSOR = "model.layers.1.mlp.down_proj.weight"


class Published(Watched):
    """Stands where replica records are published."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[ReplicaRecord] = []

    def publish(self, record: ReplicaRecord) -> None:
        self.records.append(record)
        self.notify()

    def withdraw(self, model: str) -> None:
        pass

    @property
    def is_decided(self) -> bool:
        decided = {ReplicaState.READY, ReplicaState.FAILED}
        return bool(self.records) and self.records[-1].state in decided


def flip_a_weight(directory: Path) -> None:
    """Turn one exponent bit and make every checksum fit again."""
    manifest = parse_manifest((directory / "manifest.json").read_bytes())
    entry = manifest.tensors_by_name()[TENSOR]
    partition = manifest.partitions[entry.partition]
    content = bytearray((directory / partition.file).read_bytes())
    content[entry.offset_bytes + 1] ^= 0x40
    (directory / partition.file).write_bytes(content)
    size = partition.chunk_bytes
    checksums = [checksum(content[at : at + size]) for at in range(0, len(content), size)]
    partitions = list(manifest.partitions)
    partitions[entry.partition] = replace(partition, checksums=tuple(checksums))
    changed = replace(manifest, partitions=tuple(partitions))
    (directory / "manifest.json").write_bytes(manifest_bytes(changed))


async def start_replica(
    store: RunningStore, zygote: Zygote, stack: AsyncExitStack, queue: MemoryQueue
) -> Published:
    """Start a replica of the store's model; return once it is ready or failed."""
    published = Published()
    board = JobBoard(
        Settlement(queue),
        lambda address, listener: PushStream(address, WORKER, NODE, listener),
        lambda router: False,
    )
    client = GrpcStoreClient(lambda: store.service.address)
    ports = ReplicaPorts(
        StartPorts(client, take_lease, zygote),
        queue,
        board,
        published,  # type: ignore[arg-type]
        lambda: frozenset({WORKER}),
    )
    model = record_of(store.service.ssd.get(MODEL), (store.node_id,))
    assignment = AssignmentRecord(WORKER, MODEL, 1 << 27, "test", 0.0)
    replica = Replica(assignment, model, ReplicaSettings(WORKER, NODE, "cpu", 2, 1), ports)
    replica.start()
    stack.push_async_callback(replica.drain, 0.0)
    await published.until(lambda: published.is_decided)
    return published


@pytest.mark.slow
async def test_a_flipped_weight_with_fitting_checksums_is_never_served(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "source")
    process, zygote, queue = CanaryProcess(), Zygote(), MemoryQueue()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(process.stop)
        stack.push_async_callback(zygote.stop)
        await zygote.start()
        async with (
            running_store(tmp_path / "store", compute_canary=process.compute) as store,
            AsyncExitStack() as replicas,
        ):
            await store.register(MODEL, tmp_path / "source")
            await store.service.read_canary(MODEL)  # the first one waits for transformers
            before = await start_replica(store, zygote, replicas, queue)
            assert before.records[-1].state is ReplicaState.READY
            assert before.records[-1].timeline.first_token_s > 0
        flip_a_weight(tmp_path / "store/models" / MODEL)
        async with (
            running_store(tmp_path / "store", compute_canary=process.compute) as store,
            AsyncExitStack() as replicas,
        ):
            assert (await store.load(MODEL))[-1].done  # the checksums let it through
            await queue.append(job("waits", model=MODEL))  # and rides in the wrong canary's pass
            after = await start_replica(store, zygote, replicas, queue)
            assert after.records[-1].state is ReplicaState.FAILED
            assert "the canary failed" in after.records[-1].error
            assert ReplicaState.READY not in {record.state for record in after.records}
            assert await queue.depth(MODEL) == QueueDepth(waiting=1, claimed=0)
