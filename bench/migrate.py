"""What moving one request out of a batch of 8 costs: `python -m bench.migrate`.

Two workers on this machine serve a random Llama of about 135M parameters (bfloat16). Seven requests
run on the first; an eighth joins them with a prompt that nobody has seen, is moved to the idle
second worker by tokens, by KV, or by what the cost model chooses (interleaved), and ends there. The
client's own clock says how long it waited, and what the seven others noticed.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import rotated
from bench.machine import machine_facts, our_versions
from bench.migrate_cluster import (
    ANSWER_TOKENS,
    VOCABULARY,
    Pair,
    Stream,
    running_pair,
    write_model,
)
from bench.migrate_figures import AUTO, KV, TOKENS, Choices, Row, Sample, Stayed, judge, summarize
from gearfall.core.errors import NotFound, Unavailable
from gearfall.pb import worker_pb2 as pb

RESULTS = Path(__file__).parent / "results" / "migrate.json"
OTHERS = 7
OTHER_PROMPT_TOKENS = 128
TOKENS_BEFORE = 32
"""Of the answer before the move, all eight decoding: their median gap is a decode step."""
TOKENS_AFTER = 8
_SEEN = ("n", "ms p50", "ms p99", "steps p50", "p99", "p99 before", "during", "change")
_COST = ("rounds", "MiB", "whole ms", "predicted off by")
_PATHS = {
    TOKENS: pb.MIGRATION_PATH_TOKENS,
    KV: pb.MIGRATION_PATH_KV,
    AUTO: pb.MIGRATION_PATH_UNSPECIFIED,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.migrate", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--modes", nargs="+", choices=tuple(_PATHS), default=[*_PATHS])
    parser.add_argument("--rounds", type=int, default=10, help="migrations of each kind")
    parser.add_argument("--threads", type=int, default=2, help="of each engine")
    parser.add_argument("--layers", type=int, default=30, help="30 make 135M parameters")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    before = machine_facts()
    with tempfile.TemporaryDirectory(prefix="gearfall-bench-") as home:
        model = Path(home) / "model"
        write_model(model, max(flags.prompts) + ANSWER_TOKENS, layers=flags.layers)
        tried = asyncio.run(_measure(Path(home), model, flags))
    samples = [each for each in tried if isinstance(each, Sample)]
    stayed = [each for each in tried if isinstance(each, Stayed)]
    rows, choices = summarize(samples), judge(samples, stayed)
    document = {
        "machine": {"before": before, "after": machine_facts()},
        "versions": our_versions(),
        "settings": {"rounds": flags.rounds, "threads": flags.threads, "layers": flags.layers},
        "rows": [asdict(row) | {"others_change": row.others_change} for row in rows],
        "choices": [asdict(each) for each in choices],
        "stayed": [asdict(each) for each in stayed],
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    print_report(rows, choices, stayed, Console(width=110))


async def _measure(home: Path, model: Path, flags: argparse.Namespace) -> list[Sample | Stayed]:
    tried: list[Sample | Stayed] = []
    async with running_pair(home, model, flags.threads) as pair:
        batch = Batch(pair)
        try:
            for prompt_tokens in flags.prompts:
                for index in range(flags.rounds):
                    for mode in rotated(flags.modes, index):
                        await batch.fill()
                        try:
                            tried.append(await batch.move_one(mode, prompt_tokens, index))
                        except Unavailable as error:
                            tried.append(Stayed(mode, prompt_tokens, index, error.message))
        finally:
            await batch.stop()
    return tried


class Batch:
    """The seven others, and one more that is moved."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._others: list[Stream] = []
        self._random = random.Random(1)

    async def fill(self) -> None:
        """Have seven run on the source, each with enough of its answer left."""
        for stream in list(self._others):
            if stream.is_over or stream.tokens > ANSWER_TOKENS // 2:
                await stream.stop()
                self._others.remove(stream)
        while len(self._others) < OTHERS:
            stream = await self._start(OTHER_PROMPT_TOKENS, ANSWER_TOKENS)
            self._others.append(stream)
            await stream.wait_tokens(2)

    async def move_one(self, mode: str, prompt_tokens: int, index: int) -> Sample:
        """Add a request, move it, and let it go on for a while."""
        stream = await self._start(prompt_tokens, ANSWER_TOKENS)
        try:
            await stream.wait_tokens(TOKENS_BEFORE)
            job_id = await self._pair.job_of(stream, self._pair.source)
            if job_id is None:
                raise NotFound("the request left its worker by itself")
            step_s = median(stream.gaps_s(0.0, time.perf_counter()))
            started_s = time.perf_counter()
            target = self._pair.target.address
            reply = await self._pair.source.move(job_id, target, _PATHS[mode])
            await stream.wait_tokens(stream.tokens + TOKENS_AFTER)
            ended_s = time.perf_counter()
        finally:
            await stream.stop()
        path = TOKENS if reply.path == pb.MIGRATION_PATH_TOKENS else KV
        if mode not in {AUTO, path}:
            raise SystemExit(f"asked to move by {mode}, the worker moved by {path}")
        return Sample(
            mode=mode,
            prompt_tokens=prompt_tokens,
            round_index=index,
            path=path,
            pause_s=max(stream.gaps_s(started_s, ended_s)),
            step_s=step_s,
            reported_pause_s=reply.pause_s,
            duration_s=reply.duration_s,
            rounds=reply.rounds,
            moved_bytes=reply.moved_bytes,
            predicted_s=reply.predicted_s,
            # From its first token on: before, its prompt held the others up.
            others_before_s=self._gaps_s(stream.times_s[0], started_s),
            others_during_s=self._gaps_s(started_s, ended_s),
        )

    async def stop(self) -> None:
        """End all of them."""
        for stream in self._others:
            await stream.stop()

    def _gaps_s(self, start_s: float, end_s: float) -> tuple[float, ...]:
        return tuple(gap for stream in self._others for gap in stream.gaps_s(start_s, end_s))

    async def _start(self, prompt_tokens: int, max_tokens: int) -> Stream:
        """Start a request on the source, with a prompt that no cache knows."""
        while True:
            prompt = [self._random.randrange(3, VOCABULARY) for _ in range(prompt_tokens)]
            stream = await self._pair.start_on_source(prompt, max_tokens)
            if stream is not None:
                return stream


def print_report(
    rows: Sequence[Row], choices: Sequence[Choices], stayed: Sequence[Stayed], console: Console
) -> None:
    """Print what each kind of migration cost, and how good the cost model's choices were."""
    seen = _table("What the client and the seven others saw", *_SEEN)
    cost = _table("What it took", *_COST)
    for row in rows:
        kind = (str(row.prompt_tokens), row.mode)
        seen.add_row(
            *kind,
            str(row.samples),
            *(f"{1e3 * each:.1f}" for each in (row.pause_p50_s, row.pause_p99_s)),
            *(f"{each:.2f}" for each in (row.steps_p50, row.steps_p99)),
            *(f"{1e3 * each:.1f}" for each in (row.others_p99_before_s, row.others_p99_during_s)),
            f"{row.others_change:+.0%}",
        )
        error = row.prediction_error_p50
        cost.add_row(
            *kind,
            f"{row.rounds_p50:g}",
            f"{row.moved_bytes_p50 / 2**20:.1f}",
            f"{1e3 * row.duration_p50_s:.0f}",
            "-" if error is None else f"{error:.0%}",
        )
    console.print(seen)
    console.print(cost)
    for none in stayed:
        console.print(f"prompt of {none.prompt_tokens} by {none.mode} stayed: {none.reason}")
    for each in choices:
        console.print(
            f"prompt of {each.prompt_tokens}: by {each.faster} was faster on the median; the cost "
            f"model chose it {each.right} times of {each.made}"
        )


def _table(title: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("prompt", "by", *names):
        table.add_column(name, justify="right")
    return table


if __name__ == "__main__":
    main()
