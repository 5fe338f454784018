"""How far an engine's logits are from float32's: `python -m bench.engine.fidelity`.

The same tokens through the same bfloat16 weights, in one pass each: transformers in float32 (the
truth), transformers in bfloat16 (the model as it is published and run), gearfall exactly, gearfall
with rounded activations. The trained demo family answers held-out questions; a random Llama of 135M
parameters, which is least certain of anything, reads random tokens.
"""

import argparse
import json
import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bench.engine.model import VOCABULARY, write_model
from bench.measuring.entry import run_bench
from bench.measuring.machine import machine_facts, our_versions
from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.generation.arithmetic import Arithmetic
from gearfall.demo.arithmetic import Split, draw_distinct
from gearfall.demo.catalogue import CHECKPOINTS, MODELS
from gearfall.demo.tokenizer import EOS_ID, build_tokenizer
from services.worker.engine.batching.kv_blocks import blocks_for
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.model.engine_model import EngineModel, build_model
from services.worker.engine.model.ops import NativeOps

RESULTS = Path(__file__).parents[1] / "results" / "engine_fidelity.json"
BUILD = Path(__file__).parents[2] / "build"
MOST_TOKENS = 128

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens that a model is fed, and from where on what it says of the next one is judged."""

    tokens: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class Distance:
    """One way of computing a model, beside float32."""

    model: str
    way: str
    positions: int
    perplexity: float
    """Of the tokens that were fed; of random ones it says nothing."""
    logprob_error: float
    """Mean distance of a fed token's log-probability from float32's."""
    worst_logprob_error: float
    divergence: float
    """Mean Kullback-Leibler divergence of the distributions from float32's, in nats."""
    same_as_float32: float
    """Share of places with float32's best token."""
    same_as_bfloat16: float
    """Share of places with the best token of transformers in bfloat16."""


def distances(model: str, texts: Sequence[Text], ways: dict[str, list[Logits]]) -> list[Distance]:
    """Hold every way's logits (rows from `first` on, of each text) against float32's. Pure."""
    wanted = np.concatenate([text.tokens[text.first + 1 :] for text in texts])
    logs = {way: _log_softmax(np.concatenate(rows)) for way, rows in ways.items()}
    truth, published = logs["transformers float32"], logs["transformers bfloat16"]
    at = np.arange(len(wanted))
    found = []
    for way, log in logs.items():
        errors = np.abs(log[at, wanted] - truth[at, wanted])
        divergence = (np.exp(truth) * (truth - log)).sum(axis=-1)
        best = log.argmax(axis=-1)
        found.append(
            Distance(
                model=model,
                way=way,
                positions=len(wanted),
                perplexity=float(np.exp(-log[at, wanted].mean())),
                logprob_error=float(errors.mean()),
                worst_logprob_error=float(errors.max()),
                divergence=float(divergence.mean()),
                same_as_float32=float((best == truth.argmax(axis=-1)).mean()),
                same_as_bfloat16=float((best == published.argmax(axis=-1)).mean()),
            )
        )
    return found


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def measure(name: str, source: Path, converted: Path, texts: Sequence[Text]) -> list[Distance]:
    """Compute all texts in every way."""
    ways: dict[str, list[Logits]] = {}
    for dtype in ("float32", "bfloat16"):
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
        ways[f"transformers {dtype}"] = [_their_logits(theirs, text) for text in texts]
    ours = _our_model(source, converted)
    for arithmetic in Arithmetic:
        ours.use(arithmetic)
        ways[f"gearfall {arithmetic.value}"] = [_our_logits(ours, text) for text in texts]
    return distances(name, texts, ways)


@torch.inference_mode()
def _their_logits(model: torch.nn.Module, text: Text) -> Logits:
    ids = torch.tensor([text.tokens[:-1]])
    logits: Logits = model(input_ids=ids).logits[0, text.first :].float().numpy()
    return logits


def _our_logits(model: EngineModel, text: Text) -> Logits:
    tokens = text.tokens[:-1]
    count = len(tokens)
    step = PackedStep(
        token_ids=np.array(tokens, dtype=np.int64),
        positions=np.arange(count, dtype=np.int32),
        seq_index=np.zeros(count, dtype=np.int32),
        block_tables=np.arange(blocks_for(count), dtype=np.int32)[None],
        logit_rows=np.arange(text.first, count, dtype=np.int64),
    )
    return model.forward(step)


def _our_model(source: Path, converted: Path) -> EngineModel:
    with open_source(str(source)) as opened:
        manifest = convert(opened, converted, lambda _done, _total: None)
    mappings = []
    for partition in manifest.partitions:
        memory = mmap.mmap(-1, partition.size_bytes)
        memory.write((converted / partition.file).read_bytes())
        mappings.append(memory)
    model = build_model(
        manifest,
        mappings,
        (source / "config.json").read_bytes(),
        ops=NativeOps(torch.get_num_threads()),
        device=torch.device("cpu"),
        kv_blocks=blocks_for(MOST_TOKENS),
    )
    _our_logits(model, Text((1, 1), 0))  # the first pass makes the native one
    return model


def _questions(count: int) -> list[Text]:
    tokenizer, texts = build_tokenizer(), []
    for question in draw_distinct(count, Split.TEST, Random(0)):
        prompt = tokenizer.encode(question.prompt).ids
        answer = [*tokenizer.encode(question.answer, add_special_tokens=False).ids, EOS_ID]
        texts.append(Text((*prompt, *answer), len(prompt) - 1))
    return texts


def _random_texts(count: int) -> list[Text]:
    drawn = Random(0)
    return [
        Text(tuple(drawn.randrange(3, VOCABULARY) for _ in range(MOST_TOKENS)), 0)
        for _ in range(count)
    ]


def print_distances(found: Sequence[Distance], console: Console) -> None:
    """Print one row for each model and way."""
    table = Table(title="Beside transformers in float32", box=box.SIMPLE_HEAD)
    columns = ("model", "way", "places", "perplexity", "log-prob. off by", "at worst")
    for column in (*columns, "divergence", "float32's token", "bfloat16's"):
        table.add_column(column, justify="left" if column in {"model", "way"} else "right")
    for each in found:
        table.add_row(
            each.model,
            each.way,
            str(each.positions),
            f"{each.perplexity:.5g}",
            f"{each.logprob_error:.2g}",
            f"{each.worst_logprob_error:.2g}",
            f"{each.divergence:.2g}",
            f"{100 * each.same_as_float32:.2f} %",
            f"{100 * each.same_as_bfloat16:.2f} %",
        )
    console.print(table)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=400, help="for each demo model")
    parser.add_argument("--texts", type=int, default=8, help="of the random Llama")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    questions, found = _questions(arguments.questions), []
    works = [(name, CHECKPOINTS / name, questions) for name in MODELS]
    source, _ = write_model(BUILD / "engine" / "llama-135m")
    works.append(("random 135M", source, _random_texts(arguments.texts)))
    for name, directory, texts in works:
        with tempfile.TemporaryDirectory() as converted:
            found += measure(name, directory, Path(converted), texts)
    console = Console(width=150)
    print_distances(found, console)
    report = {
        "machine": machine_facts(),
        "versions": dict(our_versions()),
        "distances": [asdict(each) for each in found],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_bench(main)
