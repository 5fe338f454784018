"""What an engine's step costs beside the model: planning, packing, sampling, the message.

    python -m bench.engine.overhead [--rounds 5] [--steps 40] [--json FILE]

The model is a table of logits whose probabilities fall with the power 1.5 of their rank, so a step
is all overhead. Every sequence decodes, with some hundred tokens behind it. Milliseconds a step:
the median of rounds that go through all cases in turn, each round's the median of its steps.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine.batching.packing import PackedStep, pack_step
from services.worker.engine.engine import Engine
from services.worker.engine.model.sampler import Draw, Logits, sample_rows
from services.worker.engine_link.messages import SubmitJob

VOCABULARY = 49_152
PROMPT_TOKENS = 300
BATCHES = (1, 8, 32)
GREEDY = SamplingParams(max_tokens=1_000_000, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=1_000_000, temperature=0.8, top_p=0.95)
KINDS = {"greedy": GREEDY, "sampled": SAMPLED}
PARTS = ("plan", "pack", "sample", "rest", "step", "encode")


class TableModel:
    """Answers each step with the same logits, in an order of each row's own."""

    vocabulary_size = VOCABULARY

    def __init__(self, rows: int) -> None:
        falling = -1.5 * np.log(np.arange(1, VOCABULARY + 1, dtype=np.float32))
        drawn = np.random.default_rng(4)
        self.logits: Logits = np.stack([drawn.permutation(falling) for _ in range(rows)])

    def forward(self, step: PackedStep) -> Logits:
        """Return as many rows as are wanted."""
        return self.logits[: len(step.logit_rows)]


class Case:
    """An engine in the middle of decoding a batch."""

    def __init__(self, batch: int, sampling: SamplingParams, steps: int) -> None:
        blocks = KvBlocks(batch * (PROMPT_TOKENS + 100 * steps) // BLOCK_TOKENS)
        self._batch = Batch(blocks, slots=batch, step_tokens=256)
        self._model = TableModel(batch)
        self._engine = Engine(self._model, self._batch, context_tokens=1_000_000)
        self._draws = [Draw(sampling, place) for place in range(batch)]
        for number in range(batch):
            prompt = tuple((number + place) % VOCABULARY for place in range(PROMPT_TOKENS))
            self._engine.submit(SubmitJob(JobId(str(number)), Epoch(1), prompt, (), sampling))
        while len(self._engine.step().runs) < batch:
            pass

    def measure(self, steps: int) -> dict[str, float]:
        """Return the median milliseconds of each part of a step."""
        spent: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(steps):
            spent["plan"].append(_timed(lambda: self._batch.plan_step(time.monotonic())))
            chunks = self._batch.plan_step(time.monotonic())
            spent["pack"].append(_timed(lambda: pack_step(chunks, self._batch.blocks)))  # noqa: B023
            spent["sample"].append(_timed(lambda: sample_rows(self._model.logits, self._draws)))
            started_s = time.perf_counter()
            done = self._engine.step()
            spent["step"].append(1e3 * (time.perf_counter() - started_s))
            spent["encode"].append(_timed(lambda: msgspec.msgpack.encode(done)))  # noqa: B023
        found = {part: statistics.median(times) for part, times in spent.items()}
        found["rest"] = found["step"] - found["plan"] - found["pack"] - found["sample"]
        return found


def main() -> None:
    """Measure, print the table and write the JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases = {
        (kind, batch): Case(batch, sampling, arguments.rounds * arguments.steps)
        for kind, sampling in KINDS.items()
        for batch in BATCHES
    }
    rounds: defaultdict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for name, case in cases.items():
            rounds[name].append(case.measure(arguments.steps))
    table = Table("sampling", "batch", *(f"{part} ms" for part in PARTS))
    rows = []
    for (kind, batch), measured in rounds.items():
        medians = {part: statistics.median(one[part] for one in measured) for part in PARTS}
        table.add_row(kind, str(batch), *(f"{medians[part]:.3f}" for part in PARTS))
        rows.append({"sampling": kind, "batch": batch, "ms": medians})
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def _timed(call: Callable[[], object]) -> float:
    """Return how many milliseconds a call takes."""
    started_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started_s)


if __name__ == "__main__":
    main()
