"""What a forked engine process does: build the model it is told, say so, serve until the end."""

import contextlib
import gc
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from mmap import mmap

import msgspec
import torch

from gearfall.core.checkpoint.manifest import Manifest, parse_manifest
from gearfall.core.errors import CorruptCheckpoint, GearfallError, Internal
from gearfall.core.generation.canary import parse_canary
from gearfall.infra.failpoints import arm_failpoints
from gearfall.infra.history_log import close_history, count_held, open_history
from gearfall.infra.logs import configure_logging
from gearfall.infra.memory.pool_lease import map_partition
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks, blocks_for
from services.worker.engine.device import DeviceTier
from services.worker.engine.engine import Engine
from services.worker.engine.kv_memory import EngineKvMemory
from services.worker.engine.loop import EngineLoop
from services.worker.engine.model.check import PROVEN, try_unproven
from services.worker.engine.model.engine_model import build_model
from services.worker.engine.model.ops import ops_for
from services.worker.engine.starting.arrival import LoadNews
from services.worker.engine.starting.dock import AdapterDock
from services.worker.engine.starting.first_pass import run_first_pass
from services.worker.engine.step_log import open_step_log
from services.worker.engine.stream import EngineStream
from services.worker.engine_link.frames import receive_frame
from services.worker.engine_link.messages import (
    EngineFailed,
    EngineKind,
    EngineReady,
    StartEngine,
    SubmitJob,
)

_LOG = logging.getLogger(__name__)
STEP_TOKENS = 256
"""Most tokens computed in one step: what a long prompt may delay everybody else by."""
GUESS_LOGIT_BYTES = 64 << 20
"""Most bytes of logits that the drafts of a step need."""


def engine_main(sock: socket.socket) -> int:
    """Serve one model on `sock` until StopEngine or its end; return the exit status."""
    configure_logging("engine")
    arm_failpoints("engine", os.environ)
    open_history("engine", os.environ)
    with sock:
        started = time.perf_counter()
        frame = receive_frame(sock)
        if frame is None:
            return 0
        body, descriptors = frame
        stream = EngineStream(sock)
        try:
            start = msgspec.msgpack.decode(body, type=StartEngine)
            if start.engine is EngineKind.VLLM:
                return _serve_with_vllm(sock, start, descriptors, started)
            with _uncollected():
                engine, ready, kv_memory = _start(start, descriptors, started)
        except Exception as error:
            _LOG.exception("engine can't start")
            stream.send(_failure(error))
            stream.drain()
            return 1
        stream.send(ready, [kv_memory.fileno()] if kv_memory else [])
        EngineLoop(engine, stream).run()
        engine.beside.close()
    if not stream.is_closed:  # else its worker died, and it went with all that it held
        close_history()
    return 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector away from what is built here, then and later: it stays to the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _start(
    start: StartEngine, descriptors: Sequence[int], started: float
) -> tuple[Engine, EngineReady, EngineKvMemory | None]:
    manifest = parse_manifest(start.manifest_json)
    news = LoadNews(socket.socket(fileno=descriptors[-1])) if start.is_loading else None
    device = torch.device(start.device)
    mappings = _map_partitions(
        manifest, descriptors[:-1] if news else descriptors, is_private=device.type == "cpu"
    )
    tier = None
    if device.type == "cuda":
        tier = DeviceTier(device.index or 0, mappings, news)
    attached = time.perf_counter()
    blocks = KvBlocks(max(blocks_for(start.kv_tokens), 2))
    model = build_model(
        manifest,
        mappings if tier is None else tier.partitions(),
        start.config_json,
        ops=ops_for(start.device, start.threads),
        device=device,
        kv_blocks=blocks.total_blocks,
        arrival=news if tier is None else tier,
    )
    built = time.perf_counter()
    batch = Batch(
        blocks,
        slots=start.slots,
        step_tokens=max(STEP_TOKENS, start.slots),
        guess_tokens=GUESS_LOGIT_BYTES // (4 * manifest.model.vocabulary_size),
    )
    engine = Engine(
        model,
        batch,
        context_tokens=manifest.model.context_tokens,
        adapters=AdapterDock(model.adapters, start.manifest_json),
        step_log=open_step_log(os.environ),
    )
    arithmetic = model.use(start.arithmetic)
    canary = parse_canary(start.canary_json)
    expected = _foretellable(start, manifest.model.architecture)
    run_first_pass(model, canary, blocks, engine.foretelling, expected)
    model.finish()
    if news is not None:
        news.wait_done()
    if tier is not None:
        tier.close()
    try_unproven(model, manifest.model.architecture)
    if (side_pass := model.side_pass()) is not None:
        engine.beside.use(side_pass)
    count_held("jobs", lambda: batch.running + batch.waiting)
    count_held("blocks", lambda: blocks.total_blocks - blocks.free_blocks)
    memory = model.kv_memory
    ready = EngineReady(
        pid=os.getpid(),
        attach_s=attached - started,
        build_s=built - attached,
        first_token_s=time.perf_counter() - built,
        kv_bytes=model.kv_bytes,
        kv_layout=None if memory is None else memory.layout,
        needs_pool=tier is None,
        arithmetic=arithmetic,
    )
    return engine, ready, memory


def _foretellable(start: StartEngine, architecture: str) -> Sequence[SubmitJob]:
    """Return the jobs that may ride in the first pass.

    The trial of an unproven family writes over its cache.
    """
    return start.expected if architecture in PROVEN else ()


def _serve_with_vllm(
    sock: socket.socket, start: StartEngine, descriptors: Sequence[int], started: float
) -> int:
    """Hand the whole checkpoint to vLLM, which knows nothing of one that is still being loaded."""
    from services.worker.engine.vllm import vllm_main

    manifest = parse_manifest(start.manifest_json)
    news = LoadNews(socket.socket(fileno=descriptors[-1])) if start.is_loading else None
    mappings = _map_partitions(manifest, descriptors[:-1] if news else descriptors)
    if news is not None:
        news.wait_done()
    times = {"started": started, "attached": time.perf_counter()}
    return vllm_main(sock, start, manifest, mappings, times)


def _map_partitions(
    manifest: Manifest, partition_fds: Sequence[int], *, is_private: bool = True
) -> list[mmap]:
    if len(partition_fds) != len(manifest.partitions):
        raise Internal(f"{len(partition_fds)} partitions came, the manifest has others")
    mappings = []
    for descriptor, partition in zip(partition_fds, manifest.partitions, strict=True):
        mappings.append(map_partition(descriptor, partition.size_bytes, is_private=is_private))
        os.close(descriptor)
    return mappings


def _failure(error: Exception) -> EngineFailed:
    text = error.message if isinstance(error, GearfallError) else f"{type(error).__name__}: {error}"
    return EngineFailed(text, is_corrupt=isinstance(error, CorruptCheckpoint))
