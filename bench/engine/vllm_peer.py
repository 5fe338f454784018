"""vLLM as the bench's peer, run by an interpreter that has it: `python vllm_peer.py MODEL THREADS`.

One JSON request a line on standard input, one JSON answer a line on standard output. It sees
nothing of gearfall. Its way `eager` compiles nothing, `compiled` is what it does by itself. A
worker of gearfall starts it eagerly on a CPU too, but with prefix caching, which is off here.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

MOST_JOBS = 32
KV_BYTES = 1 << 30


class Peer:
    """An engine for each way, kept once it was asked for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._engines: dict[str, Any] = {}
        self._asked = 0

    async def run(self, way: str, requests: Sequence[Any], batch: int) -> tuple[float, list[int]]:
        """Answer all, at most `batch` at a time; return the seconds and the first tokens."""
        if way not in self._engines:
            self._engines[way] = self._start(way)
        engine, places = self._engines[way], asyncio.Semaphore(batch)
        begun = time.perf_counter()
        answers = await asyncio.gather(*(self._answer(engine, places, each) for each in requests))
        return time.perf_counter() - begun, answers

    def _start(self, way: str) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=self._directory,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_num_seqs=MOST_JOBS,
            kv_cache_memory_bytes=KV_BYTES,
            enable_prefix_caching=False,
            enforce_eager=way == "eager",
            disable_log_stats=True,
        )
        return AsyncLLM.from_engine_args(arguments)

    async def _answer(self, engine: Any, places: asyncio.Semaphore, request: Any) -> int:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        prompt, count = request
        params = SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            logprobs=2,
            output_kind=RequestOutputKind.DELTA,
        )
        tokens: list[int] = []
        self._asked += 1
        async with places:
            asked = {"type": "token", "prompt_token_ids": prompt}
            async for output in engine.generate(asked, params, str(self._asked)):
                tokens += output.outputs[0].token_ids
        assert len(tokens) == count, "an answer is short"
        return tokens[0]


async def serve(peer: Peer, answers: Any) -> None:
    """Answer requests until standard input ends."""
    import vllm

    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        if "warm" in request:
            await peer.run(request["warm"], [(list(range(3, 20)), 3)] * 2, 2)
            answers.write(json.dumps({"version": vllm.__version__}) + "\n")
            continue
        seconds, firsts = await peer.run(request["way"], request["requests"], request["batch"])
        answers.write(json.dumps({"seconds": seconds, "first_tokens": firsts}) + "\n")


def main() -> None:
    """Set what vLLM reads of the environment, and serve."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # it prints; only answers go to the bench
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": sys.argv[2],
    }
    asyncio.run(serve(Peer(sys.argv[1]), answers))


if __name__ == "__main__":
    main()
