"""A small double of vLLM's public API: AsyncLLM.generate and what goes in and comes out of it.

Shapes as in vLLM 0.11 to 0.27: `generate(prompt, sampling_params, request_id, *, priority)` is an
async generator of outputs with one completion each, whose `token_ids` and `logprobs` are what is
new; closing it aborts the request.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.worker.engine.vllm_library import VllmLibrary

VOCABULARY = 31
NextLogits = Callable[[Sequence[int]], Sequence[float]]


def counting_logits(tokens: Sequence[int]) -> list[float]:
    """The best token is a checksum of all before it, as in `counting_model`."""
    best = sum((place + 1) * token for place, token in enumerate(tokens)) % VOCABULARY
    return [9.0 if token == best else -token / 100 for token in range(VOCABULARY)]


class EngineDeadError(Exception):
    """vLLM's own."""


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class AsyncLLM:
    """One engine over a function from tokens to logits; steps when `step` is called, or freely."""

    next_logits: NextLogits = counting_logits
    tokens_at_once: int = 1
    is_stepped: bool = False
    requests: list[tuple[Any, Any, str, int]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    error: Exception | None = None
    is_shut_down: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def step(self, count: int = 1) -> None:
        """Let `count` outputs out."""
        for _ in range(count):
            self._turns.release()

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append((prompt, sampling_params, request_id, priority))
        tokens = list(prompt["prompt_token_ids"])
        left = sampling_params["max_tokens"]
        is_finished = False
        try:
            while left > 0:
                await (self._turns.acquire() if self.is_stepped else asyncio.sleep(0))
                if self.error is not None:
                    raise self.error
                fresh = [self._draw(tokens, sampling_params) for _ in range(self._count(left))]
                left -= len(fresh)
                is_stopped = any(token in sampling_params["stop_token_ids"] for token, _ in fresh)
                completion = CompletionOutput(
                    0, "", [token for token, _ in fresh], None, [logprobs for _, logprobs in fresh],
                    "stop" if is_stopped else "length" if left == 0 else None,
                )  # fmt: skip
                is_finished = is_stopped or left == 0
                yield RequestOutput(request_id, [completion], is_finished)
                if is_finished:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            if not is_finished:
                self.aborted.append(request_id)
            raise

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _count(self, left: int) -> int:
        return min(left, self.tokens_at_once)

    def _draw(self, tokens: list[int], sampling_params: Any) -> tuple[int, dict[int, Logprob]]:
        logits = self.next_logits(tokens)
        total = math.log(sum(math.exp(each) for each in logits))
        ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
        tokens.append(ranked[0])
        top = ranked[: sampling_params["logprobs"]]
        return ranked[0], {
            token: Logprob(logits[token] - total, rank + 1) for rank, token in enumerate(top)
        }


def library(engine: AsyncLLM) -> VllmLibrary:
    """What `import_vllm` would return, over `engine`; parameters are plain dictionaries."""

    def start(arguments: dict[str, Any]) -> AsyncLLM:
        engine.arguments = arguments
        return engine

    return VllmLibrary(
        engine_args=dict,
        from_engine_args=start,
        sampling_params=dict,
        delta="delta",
        dead_errors=(EngineDeadError,),
    )
