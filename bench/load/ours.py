"""gearfall's side of the loading bench: `python -m bench.load.ours store|attach|raw ...`.

`store` is a whole store service without its gRPC door, `attach` a process that takes a lease and
makes tensors as an engine does, `raw` the disk's ceiling. Lines of JSON, as in `bench.load.peer`.
"""

import asyncio
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch

from bench.load.peer import digest, memory_kib, reset_peak, touch
from bench.raw_read import raw_read
from gearfall.core.checkpoint.manifest import PartitionEntry
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.canary import Canary
from gearfall.core.ids import ModelName, NodeId
from gearfall.infra.memory.pool_lease import map_partition, take_lease
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.memory_state import MemoryState
from services.store.main import SWITCH_INTERVAL_S
from services.store.models.canary_process import CanaryRequest
from services.store.service import StoreService
from services.store.settings import StoreSettings
from services.store.tiers.spare_memory import SpareMemory
from services.worker.engine.model.weights import StoredTensors

POOL_BYTES = 64 * 2**30
"""No limit in practice: one model at a time is resident."""
SPARE_TIMEOUT_S = 60.0


async def serve_store(directory: Path) -> None:
    """Register, load and unload models as the lines on standard input ask."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    cluster = Cluster(MemoryState())
    await cluster.start()
    settings = StoreSettings(NodeId("bench"), directory, directory / "attach", POOL_BYTES)
    service = StoreService(settings, cluster, compute_canary=_no_canary)
    await service.open()
    await service.start("127.0.0.1:1")
    say(ready=True, attach_socket=str(service.attach.path))
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        say(**await _answer(service, request))
    await service.stop()
    await cluster.stop()


async def _answer(service: StoreService, request: dict[str, str]) -> dict[str, object]:
    if request["do"] in {"fill spare", "drop spare"}:
        await _settle_spare(service, is_wanted=request["do"] == "fill spare")
        return {}
    model = request["model"]
    if request["do"] == "register":
        if model not in service.ssd.models:
            await service.register(model, request["path"]).wait()
        stored = service.ssd.get(ModelName(model))
        paths = [str(stored.partition_path(i)) for i in range(len(stored.manifest.partitions))]
        return {"paths": paths, "size_bytes": stored.manifest.size_bytes}
    if request["do"] == "unload":
        return {"freed_bytes": service.unload(model)}
    if request["do"] == "measure":
        with PeakMemory() as peak:
            await service.load(model).wait()
        return {"peak_bytes": peak.private_bytes}
    started = time.perf_counter()
    loaded = await service.load(model).wait()
    return {"load_s": time.perf_counter() - started, "digest": loaded.digest}


async def _settle_spare(service: StoreService, *, is_wanted: bool) -> None:
    spare = service.pool.allocator
    assert isinstance(spare, SpareMemory)
    if not is_wanted:
        spare.want(())
    if not await asyncio.to_thread(spare.wait_settled, SPARE_TIMEOUT_S):
        raise SystemExit("the store gets no memory ready")


async def _no_canary(_request: CanaryRequest, _size_bytes: int) -> Canary:
    raise InvalidRequest("loading alone is measured here")


class PeakMemory:
    """Growth of a process beyond shared memory (the pool), sampled: VmHWM counts the pool too."""

    def __enter__(self) -> "PeakMemory":
        self.private_bytes = 0
        self._before = _private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.002):
            self.private_bytes = max(self.private_bytes, _private_bytes() - self._before)


def _private_bytes() -> int:
    return (memory_kib("RssAnon") + memory_kib("RssFile")) * 1024


async def attach(socket: str, model: str) -> None:
    """Take a lease and make every tensor; touch every page."""
    say(ready=True)
    request = json.loads(await asyncio.to_thread(sys.stdin.readline))
    before_kib = reset_peak()
    started = time.perf_counter()
    lease = await take_lease(socket, model, request["manifest"], "bench")
    leased = time.perf_counter()
    mappings = [
        map_partition(fd, size)
        for fd, size in zip(lease.partition_fds, lease.partition_sizes, strict=True)
    ]
    mapped = time.perf_counter()
    stored = StoredTensors(lease.manifest, mappings, torch.device("cpu"), lambda name: name)
    names = [*lease.manifest.tensors_by_name()]
    tensors = {name: stored.find([name]) for name in names}
    attached = time.perf_counter()
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch(found)
    touched = time.perf_counter()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    say(
        lease_s=leased - started,
        map_s=mapped - leased,
        views_s=attached - mapped,
        touch_s=touched - attached,
        faults=faults,
        peak_bytes=(memory_kib("VmHWM") - before_kib) * 1024 - sum(lease.partition_sizes),
        tensor_bytes=sum(tensor.nbytes for tensor in found.values()),
        digest=digest(found) if request["digest"] else "",
    )


def raw(path: Path, *, is_ring: bool) -> None:
    """Read a file directly into memory that is there, nothing checked."""
    say(ready=True)
    sys.stdin.readline()
    size_bytes = path.stat().st_size
    partition = PartitionEntry(path.name, size_bytes, 4 << 20, ())
    say(load_s=raw_read(path, partition, is_ring=is_ring), touch_s=0.0, tensor_bytes=size_bytes)


def say(**fields: object) -> None:
    """Write one line."""
    print(json.dumps(fields), flush=True)


def main() -> None:
    """Do what the first argument says."""
    what, first, *rest = sys.argv[1:]
    if what == "store":
        asyncio.run(serve_store(Path(first)))
    elif what == "attach":
        asyncio.run(attach(first, rest[0]))
        os._exit(0)
    else:
        raw(Path(first), is_ring=rest[0] == "io_uring")


if __name__ == "__main__":
    main()
