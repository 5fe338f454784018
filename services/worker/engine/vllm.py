"""A vLLM engine process: gearfall's messages on its socket, vLLM's public API behind them.

Started by the zygote like any engine when a worker runs with `--engine vllm`; needs the extra
`vllm` (gearfall[vllm], vLLM 0.11 or newer: the V1 engine, whose log-probabilities are those of the
unmodified distribution). vLLM is imported here and nowhere else, when the process starts.

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
import importlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import InvalidRequest, Unavailable
from gearfall.core.generation.canary import Canary, check_answer, parse_canary
from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from services.worker.engine.vllm_jobs import VllmJobs
from services.worker.engine.vllm_values import VllmClient, VllmRequest, VllmToken
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
_MIN_LOGPROBS = 2
"""The margin needs the second best."""
_CANARY_LOGPROBS = 20
"""vLLM's own limit where it isn't raised."""
CANARY_NOISE_FACTOR = 32.0
"""How much more than float32's noise a canary may differ: bfloat16 keeps 8 bits of 24, and the
sums of a layer are rounded once more. An assumption: it was not measured on a device."""


class VllmEngine:
    """vLLM's AsyncLLM by its public methods: generate, shutdown. Implements `VllmClient`."""

    def __init__(self, engine: Any, library: Any) -> None:
        """`engine`: an AsyncLLM. `library`: see `import_vllm`."""
        self._engine = engine
        self._library = library

    async def generate(self, request: VllmRequest) -> AsyncGenerator[Sequence[VllmToken], None]:
        """See `VllmClient`. vLLM aborts a request whose generator is closed or cancelled."""
        outputs = self._engine.generate(
            {
                "prompt_token_ids": list(request.token_ids),
                "cache_salt": f"tenant:{request.tenant}",
            },
            self._sampling(request.sampling),
            request.request_id,
            priority=1 if request.priority is Priority.BATCH else 0,
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    (completion,) = output.outputs
                    if completion.token_ids:
                        yield _tokens_of(completion)
        except self._library.dead_errors as error:
            raise ConnectionError(f"vLLM is dead: {error}") from error

    def close(self) -> None:
        """End vLLM's own processes."""
        self._engine.shutdown()

    def _sampling(self, sampling: SamplingParams) -> Any:
        # Its own end-of-sequence token is ignored: the job's stop tokens name those that count.
        return self._library.sampling_params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=None if sampling.is_greedy else sampling.seed,
            stop_token_ids=[] if sampling.ignore_eos else list(sampling.stop_token_ids),
            ignore_eos=True,
            logprobs=max(_MIN_LOGPROBS, sampling.top_logprobs),
            detokenize=False,
            output_kind=self._library.delta,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class VllmLibrary:
    """What is used of the package."""

    engine_args: Callable[..., Any]
    from_engine_args: Callable[[Any], Any]
    sampling_params: Callable[..., Any]
    delta: Any
    """RequestOutputKind.DELTA: each output holds what is new."""
    dead_errors: tuple[type[Exception], ...]


def import_vllm() -> VllmLibrary:
    """Import vLLM. Raises Unavailable when it isn't installed or is too old."""
    try:
        arguments = importlib.import_module("vllm.engine.arg_utils")
        engines = importlib.import_module("vllm.v1.engine.async_llm")
        errors = importlib.import_module("vllm.v1.engine.exceptions")
        sampling = importlib.import_module("vllm.sampling_params")
    except ImportError as error:
        raise Unavailable(
            f"vLLM can't be imported ({error}): install gearfall[vllm], or run the worker with "
            "--engine gearfall"
        ) from error
    return VllmLibrary(
        engine_args=arguments.AsyncEngineArgs,
        from_engine_args=engines.AsyncLLM.from_engine_args,
        sampling_params=sampling.SamplingParams,
        delta=sampling.RequestOutputKind.DELTA,
        dead_errors=(errors.EngineDeadError,),
    )


def engine_arguments(
    library: VllmLibrary, start: StartEngine, manifest: Manifest, directory: Path
) -> Any:
    """Return vLLM's arguments for a model in `directory`, within the worker's limits."""
    facts = manifest.model
    return library.engine_args(
        model=str(directory),
        load_format="safetensors",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        max_model_len=facts.context_tokens,
        max_num_seqs=start.slots,
        max_logprobs=_CANARY_LOGPROBS,
        kv_cache_memory_bytes=_kv_bytes(start, manifest),
        enable_prefix_caching=True,
        scheduling_policy="priority",
        disable_log_stats=True,
    )


def write_directory(
    start: StartEngine, manifest: Manifest, mappings: Sequence[mmap], directory: Path
) -> None:
    """Write what vLLM reads of a model: its tensors once, its configs."""
    stored = {tensor.name for tensor in manifest.tensors}
    tensors = rank_tensors(manifest, mappings, 0, 1)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items() if name in stored},
        directory / _WEIGHTS,
        metadata={"format": "pt"},
    )
    (directory / "config.json").write_bytes(start.config_json)
    if start.generation_config_json:
        (directory / "generation_config.json").write_bytes(start.generation_config_json)


async def run_canary(client: VllmClient, canary: Canary) -> None:
    """Return if vLLM's best tokens and their log-probabilities are those that were recorded.

    Each token is asked for behind the recorded ones before it. Raises CorruptCheckpoint.
    """
    fed = (*canary.prompt_token_ids, *(token.token_id for token in canary.answer))
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, top_logprobs=_CANARY_LOGPROBS, ignore_eos=True
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
    sock: socket.socket, client: VllmClient, manifest: Manifest, ready: EngineReady
) -> int:
    """Serve jobs on `sock` until StopEngine, its end or vLLM's; return the exit status."""
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
    await asyncio.wait((reading, died), return_when=asyncio.FIRST_COMPLETED)
    is_dead = jobs.died.is_set()
    reading.cancel()
    died.cancel()
    await asyncio.gather(reading, died, return_exceptions=True)
    await jobs.stop()
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    writer.close()
    return 1 if is_dead else 0


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
    kind, _, index = start.device.partition(":")
    if kind == "cuda":
        # Before vLLM or torch has touched a device, which this process has not.
        os.environ["CUDA_VISIBLE_DEVICES"] = index or "0"
    library = import_vllm()
    return asyncio.run(_build_and_serve(sock, start, manifest, mappings, times, library))


async def _build_and_serve(  # noqa: PLR0917 - what a start has
    sock: socket.socket,
    start: StartEngine,
    manifest: Manifest,
    mappings: Sequence[mmap],
    times: Mapping[str, float],
    library: VllmLibrary,
) -> int:
    with tempfile.TemporaryDirectory(prefix="gearfall-vllm-") as name:
        directory = Path(name)
        write_directory(start, manifest, mappings, directory)
        for mapping in mappings:
            mapping.close()
        arguments = engine_arguments(library, start, manifest, directory)
        client = VllmEngine(library.from_engine_args(arguments), library)
        # vLLM has the weights on its device; the configs it may still ask for.
        (directory / _WEIGHTS).unlink()
        return await _check_and_serve(sock, start, manifest, times, client)


async def _check_and_serve(
    sock: socket.socket,
    start: StartEngine,
    manifest: Manifest,
    times: Mapping[str, float],
    client: "VllmEngine",
) -> int:
    try:
        built = time.perf_counter()
        await run_canary(client, parse_canary(start.canary_json))
        ready = EngineReady(
            pid=os.getpid(),
            attach_s=times["attached"] - times["started"],
            build_s=built - times["attached"],
            first_token_s=time.perf_counter() - built,
            kv_bytes=_kv_bytes(start, manifest),
            needs_pool=False,
        )
        return await serve(sock, client, manifest, ready)
    finally:
        client.close()


def _kv_bytes(start: StartEngine, manifest: Manifest) -> int:
    """Bytes of the KV cache that the worker allows, in the 2-byte elements that vLLM caches."""
    return start.kv_tokens * manifest.model.kv_bytes_per_token(element_bytes=2)


async def _read(reader: asyncio.StreamReader, jobs: VllmJobs) -> None:
    """Hand messages to the jobs until StopEngine or the worker's end."""
    decoder = FrameDecoder()
    while data := await reader.read(_READ_BYTES):
        for body in decoder.feed(data):
            message = _DECODER.decode(body)
            if isinstance(message, StopEngine):
                return
            jobs.handle(message)


def _tokens_of(completion: Any) -> list[VllmToken]:
    """Return the new tokens of a completion with their log-probabilities."""
    return [
        VllmToken(
            int(token_id), {int(other): float(each.logprob) for other, each in logprobs.items()}
        )
        for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
