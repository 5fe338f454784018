"""What moving one request out of a batch of 8 costs: `python -m bench.migrate`.

Two workers on this machine serve a random Llama of about 135M parameters (bfloat16). Seven requests
run on the first and three on the second; an eighth joins the seven with a prompt that nobody has
seen, is moved to the second worker by tokens, by KV, or by what the cost model chooses
(interleaved), and ends there. The client's own clock says how long it waited, and what those that
stayed on the source and those on the target noticed: `bench.migrate.figures` says what is held
against what.

    python -m bench.migrate --prompts 128 1024 4096 --rounds 20 5 2 --modes none kv tokens
    python -m bench.migrate --link-mb-per-s 25 --prompts 64 128 256 512 --rounds 5

The second is the hard case for the cost model: over a link of that speed both paths take about as
long, so that only good predictions choose well.

Both engines decode before, during and after a move, so that their share of memory bandwidth is the
same throughout, and they have one thread each: with both workers' processes and the router they
leave a machine of four cores one for what a target computes beside its steps. The rows
`none` move nothing: what they show is the machine's own noise, on the target beside a request with
a prompt as long that was born there.
"""

import argparse
import asyncio
import itertools
import json
import os
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

from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated
from bench.migrate.cluster import ANSWER_TOKENS, VOCABULARY, Pair, Stream, running_pair, write_model
from bench.migrate.figures import (
    AUTO,
    KV,
    KV_STREAM,
    NONE,
    TOKENS,
    Choices,
    Gaps,
    Others,
    Row,
    Sample,
    Stayed,
    judge,
    summarize,
)
from gearfall.core.errors import NotFound, Unavailable
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.pb import worker_pb2 as pb

RESULTS = Path(__file__).parents[1] / "results" / "migrate.json"
OTHERS = 7
ON_TARGET = 3
OTHER_PROMPT_TOKENS = 128
TOKENS_BEFORE = 32
"""Of the answer before the move, all eight decoding: their median gap is a decode step."""
TOKENS_AFTER = 4
TOKENS_SETTLED = 20
"""Behind those: their gaps are what the changed batch takes."""
TOKENS_UNMOVED = 8
"""How long a row looks on that moves nothing."""
_SEEN = ("n", "ms p50", "ms p99", "steps p50", "p99")
_OTHERS = ("p50", "p99", "during", "after p50", "born p50", "change", "over born", "by the move")
LIMIT_VARIABLE = "GEARFALL_KV_BYTES_PER_S_LIMIT"
_COST = ("rounds", "MiB", "whole ms", "predicted off by")
_PATHS = {
    TOKENS: pb.MIGRATION_PATH_TOKENS,
    KV: pb.MIGRATION_PATH_KV,
    KV_STREAM: pb.MIGRATION_PATH_KV_STREAM,
    AUTO: pb.MIGRATION_PATH_UNSPECIFIED,
}
_PATH_NAMES = {path: mode for mode, path in _PATHS.items()}
MODES = (NONE, TOKENS, KV, KV_STREAM, AUTO)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.migrate", description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--modes", nargs="+", choices=(NONE, *_PATHS), default=[*MODES])
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[20, 5, 2], help="of each prompt, the last of more"
    )
    parser.add_argument(
        "--link-mb-per-s", type=float, default=0.0, help="keys and values go no faster; 0: they do"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--on-target", type=int, default=ON_TARGET, help="requests that run there")
    parser.add_argument("--layers", type=int, default=30, help="30 make 135M parameters")
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    before = machine_facts()
    if flags.link_mb_per_s:
        os.environ[LIMIT_VARIABLE] = str(1e6 * flags.link_mb_per_s)
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
        "settings": {
            "rounds": flags.rounds,
            "link_mb_per_s": flags.link_mb_per_s,
            "threads": flags.threads,
            "layers": flags.layers,
            "on_target": flags.on_target,
        },
        "rows": [asdict(row) | _changes(row) for row in rows],
        "choices": [asdict(each) for each in choices],
        "stayed": [asdict(each) for each in stayed],
        "samples": [asdict(sample) for sample in samples],
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=2) + "\n")
    print_report(rows, choices, stayed, Console(width=110))


def _changes(row: Row) -> dict[str, float | None]:
    return {
        "others_change": row.others.change,
        "target_change": row.target.change if row.target else None,
        "target_control_change": row.target.control_change if row.target else None,
    }


async def _measure(home: Path, model: Path, flags: argparse.Namespace) -> list[Sample | Stayed]:
    tried: list[Sample | Stayed] = []
    async with running_pair(home, model, flags.threads) as pair:
        batch = Batch(pair, flags.on_target)
        try:
            every = itertools.chain(flags.rounds, itertools.repeat(flags.rounds[-1]))
            for prompt_tokens, rounds in zip(flags.prompts, every, strict=False):
                for index in range(rounds):
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
    """The seven others, those on the target, and one more that is moved."""

    def __init__(self, pair: Pair, on_target: int = ON_TARGET) -> None:
        self._pair = pair
        self._wanted = {pair.source: OTHERS, pair.target: on_target}
        self._running: dict[WorkerDoor, list[Stream]] = {door: [] for door in self._wanted}
        self._random = random.Random(1)

    async def fill(self) -> None:
        """Have as many run on both as shall, each with enough of its answer left."""
        for door, wanted in self._wanted.items():
            streams = self._running[door]
            for stream in list(streams):
                if stream.is_over or stream.tokens > ANSWER_TOKENS // 2:
                    await stream.stop()
                    streams.remove(stream)
            while len(streams) < wanted:
                stream = await self._start(door, OTHER_PROMPT_TOKENS)
                streams.append(stream)
                await stream.wait_tokens(2)

    async def move_one(self, mode: str, prompt_tokens: int, index: int) -> Sample:
        """Add a request, move it, and let it go on for a while."""
        born = await self._bear(prompt_tokens) if mode == NONE else None
        stream = await self._start(self._pair.source, prompt_tokens)
        try:
            await stream.wait_tokens(TOKENS_BEFORE)
            step_s = median(stream.gaps_s(0.0, time.perf_counter()))
            started_s = time.perf_counter()
            reply, resumed_s = await self._move(stream, mode)
            await stream.wait_tokens(stream.tokens + TOKENS_AFTER)
            ended_s = time.perf_counter()
            if reply is not None:
                await stream.wait_tokens(stream.tokens + TOKENS_SETTLED)
            settled_s = time.perf_counter()
        finally:
            await stream.stop()
            if born is not None:
                await born.stop()
        path = NONE if reply is None else _PATH_NAMES[reply.path]
        if mode not in {AUTO, path}:
            raise SystemExit(f"asked to move by {mode}, the worker moved by {path}")
        reply = reply or pb.MigrateJobReply(duration_s=ended_s - started_s)
        # From its first token on: before, its prompt held the others up.
        cuts = (stream.times_s[0], started_s, resumed_s, ended_s, settled_s)
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
            predicted_other_s=reply.predicted_other_s,
            others=self._gaps(self._pair.source, cuts),
            target=self._gaps(self._pair.target, cuts),
        )

    async def _bear(self, prompt_tokens: int) -> Stream:
        """Have a request as long run on the target that was never anywhere else."""
        born = await self._start(self._pair.target, prompt_tokens)
        await born.wait_tokens(1)
        return born

    async def stop(self) -> None:
        """End all of them."""
        for stream in itertools.chain(*self._running.values()):
            await stream.stop()

    async def _move(self, stream: Stream, mode: str) -> tuple[pb.MigrateJobReply | None, float]:
        """Move a request; return the reply and when its first token came from the target.

        None, and a later time than any, if it was to stay.
        """
        if mode == NONE:
            await stream.wait_tokens(stream.tokens + TOKENS_UNMOVED)
            return None, float("inf")
        job_id = await self._pair.job_of(stream, self._pair.source)
        if job_id is None:
            raise NotFound("the request left its worker by itself")
        target = self._pair.target.address
        reply: pb.MigrateJobReply = await self._pair.source.move(job_id, target, _PATHS[mode])
        heard_s = time.perf_counter()
        await stream.wait_tokens(stream.tokens + 1)
        return reply, stream.resumed_s(heard_s)

    def _gaps(self, door: WorkerDoor, cuts: Sequence[float]) -> Gaps:
        """Part the gaps of those on one worker by when they ended."""
        first_s, started_s, resumed_s, ended_s, settled_s = cuts
        parts = (
            (first_s, started_s),
            (started_s, min(resumed_s, ended_s)),
            (min(resumed_s, ended_s), ended_s),
            (ended_s, settled_s),
        )
        return Gaps(
            *(
                tuple(gap for stream in self._running[door] for gap in stream.gaps_s(*part))
                for part in parts
            )
        )

    async def _start(self, door: WorkerDoor, prompt_tokens: int) -> Stream:
        """Start a request on one worker, with a prompt that no cache knows."""
        while True:
            prompt = [self._random.randrange(3, VOCABULARY) for _ in range(prompt_tokens)]
            stream = await self._pair.start_on(door, prompt, ANSWER_TOKENS)
            if stream is not None:
                return stream


def print_report(
    rows: Sequence[Row], choices: Sequence[Choices], stayed: Sequence[Stayed], console: Console
) -> None:
    """Print what each kind of migration cost, and how good the cost model's choices were."""
    seen = _table("What its client saw", *_SEEN)
    felt = _table("What the others saw: ms between tokens", "on", *_OTHERS)
    cost = _table("What it took", *_COST)
    for row in rows:
        kind = (str(row.prompt_tokens), row.mode)
        seen.add_row(
            *kind,
            str(row.samples),
            *(f"{1e3 * each:.1f}" for each in (row.pause_p50_s, row.pause_p99_s)),
            *(f"{each:.2f}" for each in (row.steps_p50, row.steps_p99)),
        )
        felt.add_row(*kind, "source", *_noticed(row.others))
        if row.target is not None:
            felt.add_row(*kind, "target", *_noticed(row.target))
        error = row.prediction_error_p50
        cost.add_row(
            *kind,
            f"{row.rounds_p50:g}",
            f"{row.moved_bytes_p50 / 2**20:.1f}",
            f"{1e3 * row.duration_p50_s:.0f}",
            "-" if error is None else f"{error:.0%}",
        )
    console.print(seen)
    console.print(felt)
    console.print(cost)
    for none in stayed:
        console.print(f"prompt of {none.prompt_tokens} by {none.mode} stayed: {none.reason}")
    for each in choices:
        console.print(
            f"prompt of {each.prompt_tokens}: by {each.faster} was faster on the median, the other "
            f"takes {each.slower_by:.0%} longer; the cost model chose it {each.right} times of "
            f"{each.made}"
        )
    made = sum(each.made for each in choices)
    if made:
        console.print(f"right in all: {sum(each.right for each in choices) / made:.0%} of {made}")


def _noticed(others: Others) -> tuple[str, ...]:
    times_s = (
        others.before_p50_s,
        others.before_p99_s,
        others.during_p99_s,
        others.after_p50_s,
        others.born_p50_s,
    )
    changes = (others.raw_change, others.control_change, others.change)
    return (
        *(f"{1e3 * each:.1f}" if each else "-" for each in times_s),
        *("-" if each is None else f"{each:+.0%}" for each in changes),
    )


def _table(title: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for name in ("prompt", "by", *names):
        table.add_column(name, justify="right")
    return table
