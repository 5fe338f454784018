"""A vLLM engine process: gearfall's messages on its socket, vLLM's public API behind them.

Started by the zygote like any engine when a worker runs with `--engine vllm`; needs the extra
`vllm` (gearfall[vllm], vLLM 0.11 or newer: the V1 engine, whose log-probabilities are those of the
unmodified distribution). vLLM is imported when the process starts, by `vllm_library`.

How the weights reach it: vLLM reads Hugging Face directories only. The process writes the leased,
verified partitions as one safetensors file, with the configs, into a private temporary directory,
has vLLM load that, and removes the file; `gearfall export` writes such a directory for use
elsewhere. No tokenizer comes along: prompts and answers are token ids.

What it can't do, and what happens then: give or take keys and values (a job moves by its tokens);
attach adapters (refused, the jobs end with the reason); repeat a sampled answer's random stream
after a move (`services.worker.engine.vllm_jobs` says why).
"""

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.canary import Canary, check_answer, parse_canary
from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from services.worker.engine.vllm_group import lead_group
from services.worker.engine.vllm_jobs import VllmJobs
from services.worker.engine.vllm_library import (
    MOST_LOGPROBS,
    VllmEngine,
    VllmLibrary,
    engine_arguments,
    import_vllm,
    kv_bytes,
    set_environment,
)
from services.worker.engine.vllm_values import VllmClient, VllmRequest
from services.worker.engine_link.frames import FrameDecoder, encode_frame
from services.worker.engine_link.messages import (
    EngineMessage,
    EngineReady,
    StartEngine,
    StopEngine,
    WorkerMessage,
)

_LOG = logging.getLogger(__name__)
_DECODER = msgspec.msgpack.Decoder(WorkerMessage)
_READ_BYTES = 1 << 18
_WEIGHTS = "model.safetensors"
CANARY_NOISE_FACTOR = 32.0
"""How much more than float32's noise a canary may differ: bfloat16 keeps 8 bits of 24, and the
sums of a layer are rounded once more. An assumption: it was not measured on a device."""


def write_directory(
    start: StartEngine, manifest: Manifest, mappings: Sequence[mmap], directory: Path
) -> None:
    """Write what vLLM reads of a model: its tensors by all their names, its configs.

    Tensors that happen to be equal share their bytes in a checkpoint; vLLM wants each of them.
    """
    stored = {tensor.name for tensor in manifest.tensors}
    tensors = rank_tensors(manifest, mappings, 0, 1)
    apart = {
        name: tensor.contiguous() if name in stored else tensor.clone()
        for name, tensor in tensors.items()
    }
    save_file(apart, directory / _WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_bytes(start.config_json)
    if start.generation_config_json:
        (directory / "generation_config.json").write_bytes(start.generation_config_json)


async def run_canary(client: VllmClient, canary: Canary) -> None:
    """Return if vLLM's best tokens and their log-probabilities are those that were recorded.

    Each token is asked for behind the recorded ones before it. Raises CorruptCheckpoint.
    """
    fed = (*canary.prompt_token_ids, *(token.token_id for token in canary.answer))
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, top_logprobs=MOST_LOGPROBS, ignore_eos=True
    )

    async def ask(place: int) -> tuple[int, float]:
        ids = fed[: len(canary.prompt_token_ids) + place]
        request = VllmRequest(f"canary/{place}", ids, sampling, "", Priority.INTERACTIVE)
        tokens = [token async for some in client.generate(request) for token in some]
        wanted = canary.answer[place].token_id
        return tokens[0].token_id, tokens[0].logprobs.get(wanted, float("-inf"))

    found = await asyncio.gather(*(ask(place) for place in range(len(canary.answer))))
    wider = tuple(
        dataclasses.replace(token, tolerance=token.tolerance * CANARY_NOISE_FACTOR)
        for token in canary.answer
    )
    check_answer(dataclasses.replace(canary, answer=wider), found)


async def serve(
    sock: socket.socket,
    client: VllmClient,
    manifest: Manifest,
    ready: EngineReady,
    processes: Sequence[int] = (),
) -> int:
    """Serve jobs on `sock` until StopEngine, its end or vLLM's; return the exit status.

    `processes`: those without which vLLM is dead, whether or not it is asked something.
    """
    reader, writer = await asyncio.open_unix_connection(sock=sock)

    def emit(message: EngineMessage) -> None:
        writer.write(encode_frame(msgspec.msgpack.encode(message)))

    facts = manifest.model
    jobs = VllmJobs(
        client, emit, total_tokens=facts.context_tokens, vocabulary_size=facts.vocabulary_size
    )
    emit(ready)
    reading = asyncio.create_task(_read(reader, jobs))
    died = asyncio.create_task(jobs.died.wait())
    with _told_of_ends(processes, jobs.died):
        await asyncio.wait((reading, died), return_when=asyncio.FIRST_COMPLETED)
    is_dead = jobs.died.is_set()
    reading.cancel()
    died.cancel()
    read, _ = await asyncio.gather(reading, died, return_exceptions=True)
    is_broken = isinstance(read, Exception) and not isinstance(read, ConnectionError)
    if is_broken:
        _LOG.error("what the worker said can't be handled", exc_info=read)
    await jobs.stop()
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()
    return 1 if is_dead or is_broken else 0


@contextlib.contextmanager
def _told_of_ends(processes: Sequence[int], ended: asyncio.Event) -> Iterator[None]:
    """Set `ended` when one of the processes, children of this one, ends during the block."""
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        for pid in processes:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                ended.set()
                continue
            stack.callback(os.close, descriptor)
            loop.add_reader(descriptor, ended.set)
            stack.callback(loop.remove_reader, descriptor)
        yield


def vllm_main(
    sock: socket.socket,
    start: StartEngine,
    manifest: Manifest,
    mappings: Sequence[mmap],
    times: Mapping[str, float],
) -> int:
    """Build and serve one model with vLLM; return the exit status.

    `times`: `started` and `attached` by time.perf_counter. Raises GearfallError when it can't
    start; nothing was said to the worker then.
    """
    if manifest.adapter is not None:
        raise InvalidRequest("the checkpoint is a LoRA adapter, not a model")
    os.dup2(2, 1)  # it prints, and nobody reads the standard output of a worker that serves
    with tempfile.TemporaryDirectory(prefix="gearfall-vllm-") as name:
        directory = Path(name)
        lead_group(directory)
        set_environment(start.device, start.threads, directory)
        library = import_vllm()
        write_directory(start, manifest, mappings, directory)
        for mapping in mappings:
            mapping.close()
        arguments = engine_arguments(library, start, manifest, directory)
        return asyncio.run(_build_and_serve(sock, start, manifest, times, library, arguments))


async def _build_and_serve(  # noqa: PLR0917 - what a start has
    sock: socket.socket,
    start: StartEngine,
    manifest: Manifest,
    times: Mapping[str, float],
    library: VllmLibrary,
    arguments: Any,
) -> int:
    engine = library.from_engine_args(arguments)
    client = VllmEngine(engine, library, manifest.model.vocabulary_size)
    # vLLM has the weights on its device; the configs it may still ask for.
    (Path(arguments.model) / _WEIGHTS).unlink()
    try:
        built = time.perf_counter()
        await run_canary(client, parse_canary(start.canary_json))
        ready = EngineReady(
            pid=os.getpid(),
            attach_s=times["attached"] - times["started"],
            build_s=built - times["attached"],
            first_token_s=time.perf_counter() - built,
            kv_bytes=kv_bytes(start, manifest),
            needs_pool=False,
        )
        cores = [child.pid for child in multiprocessing.active_children() if child.pid]
        return await serve(sock, client, manifest, ready, cores)
    finally:
        client.close()


async def _read(reader: asyncio.StreamReader, jobs: VllmJobs) -> None:
    """Hand messages to the jobs until StopEngine or the worker's end."""
    decoder = FrameDecoder()
    while data := await reader.read(_READ_BYTES):
        for body in decoder.feed(data):
            message = _DECODER.decode(body)
            if isinstance(message, StopEngine):
                return
            jobs.handle(message)
