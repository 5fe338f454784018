"""What is used of the package vLLM: AsyncLLM by its public methods, and what it is told of a model.

Nothing here imports vLLM before `import_vllm` is called.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import Unavailable
from gearfall.core.generation.job import Priority
from gearfall.core.generation.sampling import SamplingParams
from services.worker.engine.vllm_values import VllmRequest, VllmToken
from services.worker.engine_link.messages import StartEngine

MOST_LOGPROBS = 20
"""vLLM's own limit where it isn't raised."""
_LEAST_LOGPROBS = 2
"""The margin needs the second best."""
_BLOCK_TOKENS = 128
"""Most tokens of a block of its cache: those of its CPU backend; on a GPU it takes 16."""
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""What it computes in and caches, where a checkpoint is of such a dtype."""


class VllmEngine:
    """vLLM's AsyncLLM by its public methods: generate, shutdown. Implements `VllmClient`."""

    def __init__(self, engine: Any, library: "VllmLibrary", vocabulary_size: int) -> None:
        """`engine`: an AsyncLLM. `library`: see `import_vllm`."""
        self._engine = engine
        self._library = library
        self._vocabulary_size = vocabulary_size

    async def generate(self, request: VllmRequest) -> AsyncGenerator[Sequence[VllmToken], None]:
        """See `VllmClient`. vLLM aborts a request whose generator is closed or cancelled."""
        outputs = self._engine.generate(
            {
                "type": "token",
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
        # Asked for more log-probabilities than there are tokens, its sampler dies and it with it.
        wanted = max(_LEAST_LOGPROBS, sampling.top_logprobs)
        return self._library.sampling_params(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=None if sampling.is_greedy else sampling.seed,
            stop_token_ids=[] if sampling.ignore_eos else list(sampling.stop_token_ids),
            ignore_eos=True,
            logprobs=min(wanted, self._vocabulary_size),
            detokenize=False,
            output_kind=self._library.delta,
        )


@dataclass(frozen=True, slots=True)
class VllmLibrary:
    """What is used of the package."""

    engine_args: Callable[..., Any]
    from_engine_args: Callable[[Any], Any]
    sampling_params: Callable[..., Any]
    delta: Any
    """RequestOutputKind.DELTA: each output holds what is new."""
    dead_errors: tuple[type[Exception], ...]


def set_environment(device: str, threads: int, directory: Path) -> None:
    """Set what vLLM and the processes that it starts read when they are imported.

    What they need beside memory they keep in `directory`. What an operator has set stays, except
    for what the worker decides: the device and the threads.
    """
    kind, _, index = device.partition(":")
    decided = {"TMPDIR": str(directory), "VLLM_RPC_BASE_PATH": str(directory)}
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers of each start
        "VLLM_HOST_IP": "127.0.0.1",  # its processes are all on this machine
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if kind == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        decided["CUDA_VISIBLE_DEVICES"] = visible_device(int(index or 0), visible)
    else:
        decided["OMP_NUM_THREADS"] = str(threads)
        # Else every engine of a machine binds itself to the same cores, all but one.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # It compiles at every start, for longer than a small model takes to answer.
        wanted["TORCH_COMPILE_DISABLE"] = "1"
    os.environ.update(wanted | os.environ | decided)
    tempfile.tempdir = str(directory)  # it has looked at TMPDIR before


def visible_device(index: int, visible: str | None) -> str:
    """Return what to make visible so that cuda:`index` is the only device.

    `visible`: what an operator has made visible, None for all. Raises Unavailable when it has no
    such device.
    """
    if visible is None:
        return str(index)
    devices = visible.split(",")
    if index >= len(devices):
        raise Unavailable(f"cuda:{index} is not among CUDA_VISIBLE_DEVICES={visible}")
    return devices[index].strip()


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
        # Left to itself it computes float32 checkpoints in half of their bits.
        dtype=facts.dtype if facts.dtype in _ELEMENT_BYTES else "auto",
        load_format="safetensors",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        max_model_len=facts.context_tokens,
        max_num_seqs=start.slots,
        max_logprobs=MOST_LOGPROBS,
        kv_cache_memory_bytes=kv_bytes(start, manifest),
        enable_prefix_caching=True,
        scheduling_policy="priority",
        disable_log_stats=True,
        enforce_eager=start.device == "cpu",
    )


def kv_bytes(start: StartEngine, manifest: Manifest) -> int:
    """Bytes of a KV cache in which the worker's tokens find room.

    vLLM gives out whole blocks, so each job's last may be as good as empty, and keeps one itself.
    """
    facts = manifest.model
    tokens = start.kv_tokens + (start.slots + 1) * _BLOCK_TOKENS
    return tokens * facts.kv_bytes_per_token(_ELEMENT_BYTES.get(facts.dtype, 2))


def _tokens_of(completion: Any) -> list[VllmToken]:
    """Return the new tokens of a completion with their log-probabilities."""
    return [
        VllmToken(
            int(token_id), {int(other): float(each.logprob) for other, each in logprobs.items()}
        )
        for token_id, logprobs in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
