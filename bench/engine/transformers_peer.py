"""transformers as the bench's peer, a process of its own: `generate` and continuous batching.

One JSON request a line on standard input, one JSON answer a line on standard output.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from bench.engine.work import Request, Work, groups_by_length

GROUP = 8


class Peer:
    """The model in each dtype that a way asks for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._models: dict[torch.dtype, Any] = {}
        self._ways: dict[str, Callable[[Work], list[int]]] = {
            "static bf16": lambda work: self._static(work, torch.bfloat16, len(work.requests)),
            "static f32": lambda work: self._static(work, torch.float32, len(work.requests)),
            "sorted bf16": lambda work: self._static(work, torch.bfloat16, GROUP),
            "continuous bf16": lambda work: self._continuous(work, torch.bfloat16),
            "continuous f32": lambda work: self._continuous(work, torch.float32),
        }

    def run(self, way: str, work: Work) -> tuple[float, list[int]]:
        """Generate all answers; return the seconds and each answer's first token."""
        begun = time.perf_counter()
        first_tokens = self._ways[way](work)
        return time.perf_counter() - begun, first_tokens

    def warm(self, way: str) -> None:
        """Load what a way needs and generate a few tokens."""
        few = Request(tuple(range(3, 20)), 3)
        self.run(way, Work(2, (few, few)))

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            model = AutoModelForCausalLM.from_pretrained(
                self._directory, dtype=dtype, attn_implementation="sdpa"
            )
            model.generation_config.eos_token_id = None
            self._models[dtype] = model.eval()
        return self._models[dtype]

    def _static(self, work: Work, dtype: torch.dtype, size: int) -> list[int]:
        """Left-padded batches, one after another; a batch of one takes its requests singly."""
        model = self._model(dtype)
        first_tokens = [-1] * len(work.requests)
        for places in groups_by_length(work, 1 if work.batch == 1 else size):
            group = [work.requests[place] for place in places]
            ids, mask = _left_padded(group)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(request.answer_tokens for request in group),
                    do_sample=False,
                    pad_token_id=0,
                )
            wanted = ids.shape[1] + max(request.answer_tokens for request in group)
            assert out.shape[1] == wanted, "generate ended early"
            for row, place in enumerate(places):
                first_tokens[place] = int(out[row, ids.shape[1]])
        return first_tokens

    def _continuous(self, work: Work, dtype: torch.dtype) -> list[int]:
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = transformers.ContinuousBatchingConfig(
            max_requests_per_batch=work.batch,
            num_blocks=work.batch * 8 + 8,
            page_size=64,
            max_batch_tokens=512,
            auto_switch_to_flash=False,
        )
        with self._model(dtype).continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            first_tokens = [-1] * len(work.requests)
            wanted = {}
            for place, request in enumerate(work.requests):
                name = manager.add_request(
                    list(request.prompt), max_new_tokens=request.answer_tokens
                )
                wanted[name] = (place, request.answer_tokens)
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None:
                    assert manager.is_running(), "continuous batching died"
                elif result.is_finished():
                    place, count = wanted.pop(result.request_id)
                    assert len(result.generated_tokens) == count, "an answer is short"
                    first_tokens[place] = int(result.generated_tokens[0])
        return first_tokens


def _left_padded(group: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(request.prompt) for request in group)
    rows = [[0] * (longest - len(request.prompt)) + list(request.prompt) for request in group]
    mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in group]
    return torch.tensor(rows), torch.tensor(mask)


def main() -> None:
    """Answer requests until standard input ends."""
    directory, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; only answers go to the bench
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    peer = Peer(directory)
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:
            peer.warm(request["warm"])
            answers.write(json.dumps({"version": transformers.__version__}) + "\n")
            continue
        requests = tuple(Request(tuple(p), n) for p, n in request["requests"])
        seconds, firsts = peer.run(request["way"], Work(request["batch"], requests))
        answers.write(json.dumps({"seconds": seconds, "first_tokens": firsts}) + "\n")


if __name__ == "__main__":
    main()
