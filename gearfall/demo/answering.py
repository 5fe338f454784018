"""Lets one model of the family answer questions greedily and keeps its log-probabilities."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from gearfall.demo.arithmetic import Question
from gearfall.demo.tokenizer import EOS_ID, build_tokenizer

MAX_ANSWER_TOKENS = 12
"""A right answer has at most 8 tokens with its `<eos>`: seven digits, or a minus and six digits."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generated for one question."""

    text: str
    """The generated characters, without `<eos>`."""
    logprobs: tuple[float, ...]
    """Natural logarithm of the probability of each generated token, `<eos>` included."""
    margins: tuple[float, ...]
    """Lead of each over the second most probable token, as a difference of logarithms."""
    tokens_processed: int
    """Tokens run through the model: the prompt with `<bos>`, and all generated but the last."""


def load_model(checkpoint: Path) -> LlamaForCausalLM:
    """Load a checkpoint for inference in the number format it was saved in."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype="auto", local_files_only=True, use_safetensors=True
    )
    model.train(False)
    return model


def answer_all(
    model: LlamaForCausalLM, questions: Sequence[Question], *, batch: int = 500
) -> tuple[Answer, ...]:
    """Answer every question greedily until `<eos>`, in the order given.

    Prompts of one length go together, at most `batch` at a time, so nothing is padded and the
    log-probabilities, computed in float32, are those of each question alone (up to rounding).
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for position, question in enumerate(questions):
        by_length[len(question.prompt)].append(position)
    answers: dict[int, Answer] = {}
    for positions in by_length.values():
        for start in range(0, len(positions), batch):
            chunk = positions[start : start + batch]
            prompts = [questions[i].prompt for i in chunk]
            answers.update(zip(chunk, _answer_batch(model, prompts), strict=True))
    return tuple(answers[i] for i in range(len(questions)))


@torch.inference_mode()
def _answer_batch(model: LlamaForCausalLM, prompts: Sequence[str]) -> list[Answer]:
    """Answer prompts of one length."""
    tokenizer = build_tokenizer()
    prompt_ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(prompts))]
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor(prompt_ids)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    ids: list[Tensor] = []
    tops: list[Tensor] = []
    while len(ids) < MAX_ANSWER_TOKENS and not bool(ended.all()):
        logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        top = logits.float().log_softmax(-1).topk(2)
        ids.append(top.indices[:, 0])
        tops.append(top.values)
        ended |= ids[-1] == EOS_ID
        tokens = ids[-1][:, None]
    rows = zip(torch.stack(ids, 1).tolist(), torch.stack(tops, 1).tolist(), strict=True)
    return [_answer(row, pairs, len(prompt_ids[0])) for row, pairs in rows]


def _answer(ids: list[int], pairs: list[list[float]], prompt_tokens: int) -> Answer:
    """Cut one generated row after its `<eos>`; `pairs` holds (best, second) log-probabilities."""
    length = ids.index(EOS_ID) + 1 if EOS_ID in ids else len(ids)
    return Answer(
        text=build_tokenizer().decode(ids[:length]),
        logprobs=tuple(best for best, _ in pairs[:length]),
        margins=tuple(best - second for best, second in pairs[:length]),
        tokens_processed=prompt_tokens + length - 1,
    )
