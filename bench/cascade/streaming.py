"""What stream modes and early stops do to answers: `python -m bench.cascade streaming`.

The demo's cascade on a real cluster of one worker. The same questions in every mode, in rounds that
mix them: shares of answers that were right, went up, were stopped or replaced; tokens and
arithmetic of all stages; time to the first text and to the whole answer. Ratios are against
`whole`, which finishes every draft and shows nothing before it is decided; `buffer` and `draft`
must answer what it answers.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from gearfall.cli.demo import prepare
from gearfall.client import AsyncClient, Finished, Replaced, TextDelta
from gearfall.client.request import Options
from gearfall.core.generation.streaming import Streaming, StreamMode
from gearfall.core.ids import DeploymentName
from gearfall.demo.arithmetic import Question
from gearfall.demo.catalogue import demo_questions
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings

RESULTS = Path(__file__).parents[1] / "results" / "cascade_streaming.json"
BASE, STOPPING = DeploymentName("arith-whole"), DeploymentName("arith-stopping")
MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to ask."""

    name: str
    deployment: DeploymentName
    options: Options


MODES = (
    Mode("whole", BASE, {}),
    Mode("buffer", STOPPING, {}),
    Mode("early 2", STOPPING, {"stream_mode": StreamMode.EARLY, "hold_tokens": 2}),
    Mode("early 4", STOPPING, {"stream_mode": StreamMode.EARLY, "hold_tokens": 4}),
    Mode("draft", STOPPING, {"stream_mode": StreamMode.DRAFT}),
)
SAME = ("whole", "buffer", "draft")
"""Modes that give the same answers."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question's answer, as its client saw it."""

    text: str
    is_right: bool
    went_up: bool
    was_stopped: bool
    was_replaced: bool
    draft_tokens: int
    """Of the stages that did not answer."""
    cost_flops: float
    first_text_s: float
    whole_s: float


@dataclass(frozen=True, slots=True)
class Row:
    """One mode in one round."""

    mode: str
    right: float
    went_up: float
    stopped: float
    replaced: float
    draft_tokens: float
    """An answer, like the next two."""
    cost_flops: float
    first_text_ms: float
    """Median, like the next."""
    whole_ms: float
    differing: int
    """Answers other than those of `whole` in the first round."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON. 1 when a mode that may not change answers did."""
    parser = argparse.ArgumentParser(prog="bench.cascade streaming", description=__doc__)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        rows = asyncio.run(_measure(Path(scratch), flags))
    Console(width=160).print(_table(rows))
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(flags).items() if name != "out"},
        "rows": [asdict(each) for each in rows],
    }
    flags.out.parent.mkdir(exist_ok=True)
    flags.out.write_text(json.dumps(document, indent=1))
    return 1 if any(each.differing for each in rows if each.mode in SAME) else 0


async def _measure(scratch: Path, flags: argparse.Namespace) -> list[Row]:
    settings = LocalClusterSettings(
        runtime_dir=scratch / "run",
        data_dir=scratch / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        memory_bytes=2 * 2**30,
        log_level="WARNING",
    )
    questions, rows = demo_questions(flags.questions), []
    cluster = LocalCluster(settings)
    try:
        await cluster.start()
        demo = await asyncio.to_thread(prepare, cluster.grpc_address, quiet=True)
        async with AsyncClient(cluster.grpc_address) as client:
            for name, finishes in ((BASE, True), (STOPPING, False)):
                streaming = Streaming(finishes_drafts=finishes)
                await client.deploy(replace(demo, name=name, min_replicas=1, streaming=streaming))
            wanted = await _ask_all(client, MODES[0], questions, flags.concurrency)
            for mode in MODES[1:]:
                await _ask_all(client, mode, questions[:20], flags.concurrency)
            for number in range(flags.rounds):
                turned = (*MODES[number % len(MODES) :], *MODES[: number % len(MODES)])
                for mode in turned:
                    asked = await _ask_all(client, mode, questions, flags.concurrency)
                    rows.append(_row(mode.name, asked, wanted))
    finally:
        await cluster.stop()
    return rows


async def _ask_all(
    client: AsyncClient, mode: Mode, questions: Sequence[Question], concurrency: int
) -> list[Asked]:
    room = asyncio.Semaphore(concurrency)

    async def ask(question: Question) -> Asked:
        async with room:
            return await _ask(client, mode, question)

    return await asyncio.gather(*(ask(each) for each in questions))


async def _ask(client: AsyncClient, mode: Mode, question: Question) -> Asked:
    began_s = time.perf_counter()
    first_s, text, end, was_replaced = 0.0, "", None, False
    options: Options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, **mode.options}
    async for event in client.stream(mode.deployment, question.prompt, **options):
        if isinstance(event, TextDelta):
            first_s = first_s or time.perf_counter()
            text += event.text
        elif isinstance(event, Replaced):
            text, was_replaced = "", True
        elif isinstance(event, Finished):
            end = event
    ended_s = time.perf_counter()
    assert end is not None
    drafts = [each for each in end.stages if not each.is_accepted]
    return Asked(
        text=text,
        is_right=text.strip() == question.answer,
        went_up=bool(drafts),
        was_stopped=any(each.stopped_early for each in drafts),
        was_replaced=was_replaced,
        draft_tokens=sum(each.completion_tokens for each in drafts),
        cost_flops=end.usage.cost_flops,
        first_text_s=(first_s or ended_s) - began_s,
        whole_s=ended_s - began_s,
    )


def _row(mode: str, asked: Sequence[Asked], wanted: Sequence[Asked]) -> Row:
    return Row(
        mode,
        right=fmean(each.is_right for each in asked),
        went_up=fmean(each.went_up for each in asked),
        stopped=fmean(each.was_stopped for each in asked),
        replaced=fmean(each.was_replaced for each in asked),
        draft_tokens=fmean(each.draft_tokens for each in asked),
        cost_flops=fmean(each.cost_flops for each in asked),
        first_text_ms=1e3 * median(each.first_text_s for each in asked),
        whole_ms=1e3 * median(each.whole_s for each in asked),
        differing=sum(a.text != b.text for a, b in zip(asked, wanted, strict=True)),
    )


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="the demo's cascade; medians of the rounds, ratios round by round")
    columns = ("mode", "right", "went up", "stopped", "replaced", "draft tokens", "MFLOP")
    for column in (*columns, "first text ms", "x whole", "whole answer ms", "x whole"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    base = [each for each in rows if each.mode == MODES[0].name]
    for mode in MODES:
        own = [each for each in rows if each.mode == mode.name]
        first = [a.first_text_ms / b.first_text_ms for a, b in zip(own, base, strict=True)]
        whole = [a.whole_ms / b.whole_ms for a, b in zip(own, base, strict=True)]
        table.add_row(
            mode.name,
            f"{median(each.right for each in own):.3f}",
            f"{median(each.went_up for each in own):.3f}",
            f"{median(each.stopped for each in own):.3f}",
            f"{median(each.replaced for each in own):.3f}",
            f"{median(each.draft_tokens for each in own):.2f}",
            f"{median(each.cost_flops for each in own) / 1e6:.2f}",
            f"{median(each.first_text_ms for each in own):.1f}",
            f"{median(first):.2f} ({min(first):.2f} to {max(first):.2f})",
            f"{median(each.whole_ms for each in own):.1f}",
            f"{median(whole):.2f} ({min(whole):.2f} to {max(whole):.2f})",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
