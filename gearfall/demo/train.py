"""Trains the demo family from a seed and writes ordinary Hugging Face checkpoints.

`python -m gearfall.demo.train --out DIR` trains all three sizes on the CPU. The result is the same
for the same seed, thread count, machine type and torch version; across those it is not promised,
because sums are then taken in another order.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from gearfall.demo.arithmetic import TRAINING_MIX, Question, Split, draw_mixed
from gearfall.demo.family import HEAD_DIM, MAX_TOKENS, ROTARY_BASE, SIZES, Size
from gearfall.demo.muon import Muon
from gearfall.demo.progress import OnProgress, Progress, TrainingReport
from gearfall.demo.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCABULARY,
    build_tokenizer,
    save_tokenizer,
)

BATCH = 512
EARLY_BATCH = 256
EARLY = 0.4
"""Share of the steps with the early batch: at first, steps count for more than their noise."""
PARTS = 4
QUICK_STEPS = 20
IGNORED = -100
MUON_LR = 0.02
ADAM_LR = 3e-3
WARMUP = 0.03
"""Share of the steps over which the learning rate rises from zero."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and labels of some questions, both (questions, tokens), padded on the right."""

    tokens: Tensor
    labels: Tensor


def train_family(
    output_dir: Path,
    *,
    seed: int = 0,
    sizes: Sequence[str] = tuple(SIZES),
    steps_by_size: Mapping[str, int] | None = None,
    progress: OnProgress | None = None,
) -> tuple[Path, ...]:
    """Train the named sizes one after the other; returns the checkpoint directories.

    `steps_by_size` overrides a size's own number of steps. Each size is seeded on its own, so
    training one alone gives the same weights as training it with the others. Uses as many threads
    as torch is set to. KeyError for an unknown size.
    """
    chosen = [SIZES[name] for name in sizes]
    directories = []
    for size in chosen:
        steps = (steps_by_size or {}).get(size.name, size.steps)
        model = train(size, seed=seed, steps=steps, progress=progress)
        directories.append(save_checkpoint(model, output_dir / size.name))
    return tuple(directories)


def train(
    size: Size, *, seed: int, steps: int, progress: OnProgress | None = None
) -> LlamaForCausalLM:
    """Train one size for `steps` batches of fresh questions; returns it in float32."""
    torch.manual_seed(seed)
    rng = Random(f"{seed} {size.name}")  # noqa: S311
    model = build_model(size)
    matrices, others = _parameter_groups(model)
    muon = Muon(matrices, lr=MUON_LR)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.monotonic()
    for step in range(steps):
        factor = learning_rate_factor(step, steps)
        muon.lr = MUON_LR * factor
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * factor
        batch = EARLY_BATCH if step < EARLY * steps else BATCH
        loss = _backward(model, draw_mixed(batch, Split.TRAINING, rng, TRAINING_MIX))
        muon.step()
        adam.step()
        model.zero_grad()
        if progress is not None:
            progress(Progress(size.name, step + 1, steps, loss, time.monotonic() - started))
    return model


def build_model(size: Size) -> LlamaForCausalLM:
    """A freshly initialised model of this size, drawn from torch's current seed."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear rise over the first steps, then linear fall to nothing at the end; 0 to 1."""
    rise = max(1, math.ceil(WARMUP * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def collate(questions: Sequence[Question]) -> Batch:
    """Tokens `<bos>question answer<eos>`, with labels on the answer and `<eos>` only."""
    texts = [question.prompt + question.answer for question in questions]
    encoded = build_tokenizer().encode_batch_fast(texts)
    rows = [[*encoding.ids, EOS_ID] for encoding in encoded]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    labels = torch.full_like(tokens, IGNORED)
    for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
        answer = slice(1 + len(question.prompt), len(row))
        labels[i, answer] = tokens[i, answer]
    return Batch(tokens, labels)


def save_checkpoint(model: LlamaForCausalLM, directory: Path) -> Path:
    """Write bfloat16 weights, configuration and tokenizer; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.bfloat16()
    model.generation_config = GenerationConfig.from_dict(
        {
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "do_sample": False,
        }
    )
    model.save_pretrained(directory)
    state_for_older_readers(directory / "config.json")
    save_tokenizer(directory, max_tokens=MAX_TOKENS)
    return directory


def state_for_older_readers(config_path: Path) -> None:
    """Add number format and rotary base under their names from before transformers 5.

    A reader that knows only those would otherwise take its own defaults and answer nonsense.
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config |= {"torch_dtype": config["dtype"], "rope_theta": ROTARY_BASE}
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parameter_groups(model: LlamaForCausalLM) -> tuple[list[Parameter], list[Parameter]]:
    """The hidden matrices, and everything else: embedding and norms."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    return matrices, [p for p in model.parameters() if p.ndim != 2 or p is embedding]


def _backward(model: LlamaForCausalLM, questions: Sequence[Question]) -> float:
    """Accumulate the gradient of one batch's mean loss, part by part in order of length; the loss.

    Parts of nearly equal lengths carry far less padding than the batch as a whole.
    """
    ordered = sorted(questions, key=lambda question: len(question.prompt + question.answer))
    size = math.ceil(len(ordered) / PARTS)
    batches = [collate(ordered[i : i + size]) for i in range(0, len(ordered), size)]
    answer_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = _summed_loss(model, batch) / answer_tokens
        torch.autograd.backward(loss)
        total += loss.item()
    return total


def _summed_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch.tokens).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line, with progress bars and a log file in the output directory."""
    parser = argparse.ArgumentParser(prog="gearfall.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few steps, to try it out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    steps = dict.fromkeys(options.sizes, QUICK_STEPS) if options.quick else None
    options.out.mkdir(parents=True, exist_ok=True)
    log_path = options.out / "training.log"
    with log_path.open("a", encoding="utf-8") as log, TrainingReport(log) as report:
        report.open(seed=options.seed, threads=options.threads)
        train_family(
            options.out,
            seed=options.seed,
            sizes=options.sizes,
            steps_by_size=steps,
            progress=report,
        )


if __name__ == "__main__":
    main()
