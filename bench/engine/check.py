"""Whether greedy answers are those of transformers' own float32 forward pass."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from bench.engine.work import Work


def first_difference(source: Path, work: Work, answers: Sequence[Sequence[int]]) -> str:
    """Return where an answer leaves transformers' greedy run, empty where none does.

    One pass is fed prompt and answer: where the best token at each place is the next one fed, a run
    token by token would have gone the same way.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for number, (request, answer) in enumerate(zip(work.requests, answers, strict=True)):
        if len(answer) != request.answer_tokens:
            return f"request {number} has {len(answer)} tokens, not {request.answer_tokens}"
        fed = torch.tensor([[*request.prompt, *answer]])
        with torch.inference_mode():
            logits = model(input_ids=fed, logits_to_keep=len(answer) + 1).logits[0, :-1]
        wrong = (logits.argmax(-1) != torch.tensor(answer)).nonzero()
        if len(wrong):
            return f"request {number} differs at token {int(wrong[0])}"
    return ""
