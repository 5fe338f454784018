"""Time to first token on a real cluster, policy against policy: `python -m bench.scheduler real`.

Three nodes as processes, each with a store of its own whose disk is throttled, one worker a node,
more models than places; memory is full at the beginning, each node with another part of the models.
The same bursty requests for every policy, policies interleaved over rounds, each round with
requests of another seed: a p99 of a few dozen requests says more of the seed than of the policy.
What starts have taught outlives a scheduler: all policies find it. `real_traces.py` says what comes
and why, `real_simulated` what many seeds of it come to.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated
from bench.scheduler.company import company_of, step_in_company
from bench.scheduler.real_cluster import Answer, RealSite, running_real_site
from bench.scheduler.real_traces import TRACES, add_trace_flags, requests_of, trace_of
from gearfall.simulation.fleet.figures import quantile

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_real.json"
POLICIES = ("ours", "random", "locality")
TARGET = 1.5

Samples = Mapping[str, list[list[Answer]]]
"""By policy, a list of answers for each round."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One trace under all policies."""

    trace: str
    step_s: float
    """Of an answer in the trace's company."""
    load_s: float
    """From disk: answers are as many steps as fit into their part of it."""
    samples: Samples


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler real", description=__doc__)
    parser.add_argument("--traces", nargs="+", choices=list(TRACES), default=list(TRACES))
    add_trace_flags(parser)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--directory", type=Path, help="for the model; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    found = []
    for name in settings.traces:
        with tempfile.TemporaryDirectory(prefix="gearfall-real-") as scratch:
            found.append(asyncio.run(_measure(name, settings, Path(scratch))))
        _print(found[-1])
    settings.out.parent.mkdir(exist_ok=True)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "traces": {each.trace: asdict(each) for each in found},
    }
    settings.out.write_text(json.dumps(document, indent=1))


async def teach(site: RealSite) -> None:
    """Start every model once from disk and once from memory: canaries, and what a start takes."""
    async with site.scheduled_by("ours"):
        for _ in range(2):
            for model in site.models:
                await site.probe(model, 24, 8)
        await site.empty()


async def _measure(name: str, settings: argparse.Namespace, scratch: Path) -> Measured:
    home, trace = settings.directory or scratch, trace_of(name, settings)
    samples: dict[str, list[list[Answer]]] = {policy: [] for policy in settings.policies}
    async with running_real_site(home, scratch, trace.shape) as site:
        await teach(site)
        step_s = await step_in_company(site, company_of(trace))
        for number in range(settings.rounds):
            seed = settings.seed + number
            requests = requests_of(trace, site.models, trace.shape.load_s / step_s, seed)
            for policy in rotated(tuple(settings.policies), number):
                await site.fill()
                async with site.scheduled_by(policy):
                    samples[policy].append(await site.replay(requests))
                    await site.empty()
    return Measured(name, step_s, trace.shape.load_s, samples)


def _print(found: Measured) -> None:
    samples, console = found.samples, Console()
    console.print(
        f"trace {found.trace}, step {1e3 * found.step_s:.1f} ms, load {found.load_s:.2f} s"
    )
    table = Table(box=box.SIMPLE)
    columns = ("policy", "requests", "first token p50 s", "mean", "p90", "p99", "p99 by round")
    for name in (*columns, "p99 / ours", "mean / ours"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    ours = _first_tokens(samples["ours"]) if "ours" in samples else []
    for policy, rounds in samples.items():
        first = _first_tokens(rounds)
        by_round = (f"{quantile(_first_tokens([each]), 0.99):.2f}" for each in rounds)
        table.add_row(
            policy,
            str(len(first)),
            f"{quantile(first, 0.5):.2f}",
            f"{_mean(first):.2f}",
            f"{quantile(first, 0.9):.2f}",
            f"{quantile(first, 0.99):.2f}",
            " ".join(by_round),
            f"{quantile(first, 0.99) / quantile(ours, 0.99):.2f}" if ours else "-",
            f"{_mean(first) / _mean(ours):.2f}" if ours else "-",
        )
    console.print(table)
    console.print(f"target: p99 of random and of locality at least {TARGET} times ours")


def _first_tokens(rounds: Sequence[Sequence[Answer]]) -> list[float]:
    return [each.first_token_s for answers in rounds for each in answers]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
