"""Computes canaries with transformers' own forward pass; a process apart from the store.

`python -m services.store.models.canary_reference` reads one JSON request a line from its input and
answers each with a line. It shares no code with gearfall's engine, so that a defect there, or in
the conversion, can't hide in what is expected. Weights stay in their stored dtype and are widened
to float32 one module at a time, so memory beyond the file's mapping is the largest module's.
"""

import mmap
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.core.checkpoint.manifest import MANIFEST_FILE, parse_manifest
from gearfall.core.generation.canary import NOISE, Canary, CanaryToken, answer_length, canary_prompt
from services.store.models.canary_process import CanaryReply, CanaryRequest

_NICENESS = 5
"""Serving goes first."""


def compute_canary(request: CanaryRequest) -> Canary:
    """Return the greedy answer of transformers' float32 pass. Raises what transformers raises."""
    model = open_reference(Path(request.directory))
    prompt = canary_prompt(request.vocabulary_size, request.bos_token_id, request.context_tokens)
    answer: list[CanaryToken] = []
    for _ in range(answer_length(len(prompt), request.context_tokens)):
        ids = [*prompt, *(token.token_id for token in answer)]
        answer.append(_next_token(model, ids))
    return Canary(prompt, tuple(answer))


def open_reference(directory: Path) -> PreTrainedModel:
    """Return transformers' model of a directory, to be computed in float32. Runs no code of it."""
    settings: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
    if (directory / MANIFEST_FILE).exists():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind.from_pretrained(
            None, config=config, state_dict=_stored_tensors(directory), **settings
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **settings,
        )
    _recompute_buffers(model)
    _compute_in_float32(model)
    found: PreTrainedModel = model.eval()
    return found


def _stored_tensors(directory: Path) -> Mapping[str, torch.Tensor]:
    """Tensors of a checkpoint in the gearfall format, mapped."""
    manifest = parse_manifest((directory / MANIFEST_FILE).read_bytes())
    mappings = []
    for partition in manifest.partitions:
        with (directory / partition.file).open("rb") as file:
            mappings.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return rank_tensors(manifest, mappings, 0, 1)


def _recompute_buffers(model: PreTrainedModel) -> None:
    """Give computed buffers (rotary frequencies, scales) the values of a float32 model.

    The twin's parameters are never written, so they take address space and no memory.
    """
    with no_init_weights():
        twin = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    for name, module in model.named_modules():
        exact = dict(twin.get_submodule(name).named_buffers(recurse=False))
        for buffer in module._non_persistent_buffers_set:  # noqa: SLF001
            if buffer in exact:
                setattr(module, buffer, exact[buffer])


def _compute_in_float32(model: nn.Module) -> None:
    """Widen each module's own parameters for as long as its forward runs, and every buffer."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            narrow: dict[str, nn.Parameter] = {}
            module.register_forward_pre_hook(_Widen(narrow))
            module.register_forward_hook(_Restore(narrow), always_call=True)
        for name, buffer in tuple(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())


class _Widen:
    def __init__(self, narrow: dict[str, nn.Parameter]) -> None:
        self._narrow = narrow

    def __call__(self, module: nn.Module, _arguments: object) -> None:
        for name, parameter in tuple(module.named_parameters(recurse=False)):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                self._narrow[name] = parameter
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))


class _Restore:
    def __init__(self, narrow: dict[str, nn.Parameter]) -> None:
        self._narrow = narrow

    def __call__(self, module: nn.Module, _arguments: object, _output: object) -> None:
        while self._narrow:
            name, parameter = self._narrow.popitem()
            setattr(module, name, parameter)


@torch.inference_mode()
def _next_token(model: PreTrainedModel, ids: list[int]) -> CanaryToken:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not numbers")
    (best, second), (token_id, _) = (each.tolist() for each in logits.topk(2))
    tolerance = NOISE * max(float(logits.max() - logits.min()), 1.0)
    logprob = float(logits.log_softmax(0)[token_id])
    return CanaryToken(token_id, logprob, best - second, tolerance)


def answer_line(line: bytes) -> CanaryReply:
    """Return the reply to one request; what goes wrong is part of it."""
    request = msgspec.json.decode(line, type=CanaryRequest)
    try:
        return CanaryReply(canary=compute_canary(request))
    except Exception as error:  # whatever transformers makes of a bad model
        text = str(error).strip().splitlines()
        return CanaryReply(error=f"{type(error).__name__}: {text[0] if text else ''}"[:500])


def main() -> None:
    """Answer requests until standard input ends."""
    os.nice(_NICENESS)
    # The pipe stays ours: what a library prints goes to the log.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    for line in sys.stdin.buffer:
        replies.write(msgspec.json.encode(answer_line(line)) + b"\n")


if __name__ == "__main__":
    main()
