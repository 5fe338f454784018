"""Asks every system the same held-out questions through the REST door and compares them."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gearfall.demo.arithmetic import Question

if TYPE_CHECKING:  # the extra `demo` brings it; the other commands do without
    from openai import AsyncOpenAI

MAX_TOKENS = 16
"""More than the longest answer and its end."""

_console = Console()


@dataclass(frozen=True, slots=True)
class Answered:
    """One question put to one system."""

    system: str
    is_correct: bool
    model: str
    """Model whose answer was released."""
    cost_flops: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class SystemReport:
    """One model alone, or the cascade."""

    system: str
    questions: int
    accuracy: float
    mean_cost_flops: float
    latency_p50_s: float
    latency_p95_s: float
    first_answer_s: float
    """The first question's latency, cold start included."""
    answered_by: dict[str, float]
    """Share of the questions that each model answered."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What the plan says, from other questions."""

    loss: float
    """Most accuracy that may be lost, certified."""
    cost_ratio: float


@dataclass(frozen=True, slots=True)
class DemoReport:
    """All systems on the same questions, asked in one shuffled order."""

    systems: tuple[SystemReport, ...]
    concurrency: int
    loss: float
    """Accuracy of the large model less the cascade's, on these questions."""
    cost_ratio: float
    """The large model's mean cost over the cascade's."""
    planned: Planned

    @property
    def is_kept(self) -> bool:
        """Whether no more was lost than the plan allows, at less cost."""
        return self.loss <= self.planned.loss and self.cost_ratio > 1.0


async def measure(
    rest_address: str,
    systems: Sequence[str],
    questions: Sequence[Question],
    planned: Planned,
    *,
    concurrency: int,
    quiet: bool = False,
) -> DemoReport:
    """Ask all systems all questions; the last two systems are the large model and the cascade.

    Each system answers one question first (the cold start); then all (system, question) pairs
    run in one shuffled order, `concurrency` at once, so that noise falls on all alike.
    """
    from openai import AsyncOpenAI

    async with AsyncOpenAI(
        base_url=f"http://{rest_address}/v1", api_key="none", max_retries=0
    ) as client:
        cold = {system: await _ask(client, system, questions[0]) for system in systems}
        pairs = [(system, question) for system in systems for question in questions]
        Random(0).shuffle(pairs)  # noqa: S311
        left = iter(pairs)
        answered: list[Answered] = []
        with Progress(console=_console, disable=quiet) as bars:
            bar = bars.add_task(f"asking {len(systems)} systems", total=len(pairs))

            async def ask_until_done() -> None:
                for system, question in left:
                    answered.append(await _ask(client, system, question))
                    bars.advance(bar)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(ask_until_done())
    reports = tuple(
        _summarise([a for a in answered if a.system == system], cold[system].latency_s)
        for system in systems
    )
    large, cascade = reports[-2:]
    return DemoReport(
        reports,
        concurrency,
        loss=large.accuracy - cascade.accuracy,
        cost_ratio=large.mean_cost_flops / cascade.mean_cost_flops,
        planned=planned,
    )


async def _ask(client: "AsyncOpenAI", system: str, question: Question) -> Answered:
    begin = time.perf_counter()
    reply = await client.chat.completions.create(
        model=system,
        messages=[{"role": "user", "content": question.prompt}],
        max_tokens=MAX_TOKENS,
        temperature=0,
    )
    latency_s = time.perf_counter() - begin
    extra = reply.model_extra or {}
    text = reply.choices[0].message.content or ""
    return Answered(
        system,
        text.strip() == question.answer,
        extra["gearfall"]["model"],
        extra["gearfall"]["cost_flops"],
        latency_s,
    )


def _summarise(answered: Sequence[Answered], first_answer_s: float) -> SystemReport:
    latencies = sorted(a.latency_s for a in answered)
    count = len(answered)
    return SystemReport(
        system=answered[0].system,
        questions=count,
        accuracy=sum(a.is_correct for a in answered) / count,
        mean_cost_flops=statistics.fmean(a.cost_flops for a in answered),
        latency_p50_s=latencies[count // 2],
        latency_p95_s=latencies[min(count - 1, int(0.95 * count))],
        first_answer_s=first_answer_s,
        answered_by={
            model: seen / count for model, seen in Counter(a.model for a in answered).items()
        },
    )


def print_report(report: DemoReport) -> None:
    """Print the comparison and whether the cascade kept its promise."""
    models = [row.system for row in report.systems[:-1]]
    table = Table(title="Held-out questions through the REST door", title_justify="left")
    table.add_column("system", no_wrap=True)
    for name in ("exact", "MFLOP", "p50 ms", "p95 ms", "first ms", "answered by"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.systems:
        table.add_row(
            row.system,
            f"{row.accuracy:.1%}",
            f"{row.mean_cost_flops / 1e6:.2f}",
            f"{row.latency_p50_s * 1000:.1f}",
            f"{row.latency_p95_s * 1000:.1f}",
            f"{row.first_answer_s * 1000:.0f}",
            " / ".join(f"{row.answered_by.get(model, 0):.0%}" for model in models),
        )
    _console.print(table)
    _console.print(
        f"{report.systems[0].questions} questions each, {report.concurrency} at once; MFLOP: mean "
        f"cost of a question; first: cold start included; answered by: {' / '.join(models)}."
    )
    large = report.systems[-2].system
    verdict = "keeps" if report.is_kept else "does NOT keep"
    _console.print(
        f"The cascade {verdict} its plan: {report.loss * 100:+.1f} points lost to {large} "
        f"(certified: at most {report.planned.loss * 100:.1f}) at {report.cost_ratio:.2f} times "
        f"less cost (planned: {report.planned.cost_ratio:.2f})."
    )
