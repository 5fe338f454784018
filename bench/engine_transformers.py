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

from bench.engine_work import Request, Work, groups_by_length

GROUP = 8


class Peer:
    """The model in each dtype that a way asks for."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._models: dict[torch.dtype, Any] = {}
        self._ways: dict[str, Callable[[Work], object]] = {
            "static bf16": lambda work: self._static(work, torch.bfloat16, len(work.requests)),
            "static f32": lambda work: self._static(work, torch.float32, len(work.requests)),
            "sorted bf16": lambda work: self._static(work, torch.bfloat16, GROUP),
            "continuous bf16": lambda work: self._continuous(work, torch.bfloat16),
            "continuous f32": lambda work: self._continuous(work, torch.float32),
        }

    def run(self, way: str, work: Work) -> float:
        """Generate all answers; return the seconds."""
        begun = time.perf_counter()
        self._ways[way](work)
        return time.perf_counter() - begun

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

    def _static(self, work: Work, dtype: torch.dtype, size: int) -> None:
        """Left-padded batches, one after another; a batch of one takes its requests singly."""
        model = self._model(dtype)
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

    def _continuous(self, work: Work, dtype: torch.dtype) -> None:
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
            wanted = {}
            for request in work.requests:
                name = manager.add_request(
                    list(request.prompt), max_new_tokens=request.answer_tokens
                )
                wanted[name] = request.answer_tokens
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None:
                    assert manager.is_running(), "continuous batching died"
                elif result.is_finished():
                    count = len(result.generated_tokens)
                    assert count == wanted.pop(result.request_id), "an answer is short"


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
        seconds = peer.run(request["way"], Work(request["batch"], requests))
        answers.write(json.dumps({"seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
