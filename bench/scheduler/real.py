"""Time to first token on a real cluster, policy against policy: `python -m bench.scheduler real`.

Three nodes as processes, each with a store of its own whose disk is throttled, one worker a node,
more models than places. The same bursty trace for every policy, policies interleaved over rounds,
every run with nothing in memory at its beginning. What comes in the first part of the trace fills
the memory, from disk whatever the policy, and is not counted. What starts have taught outlives a
scheduler: all policies find it.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bench.figures import rotated
from bench.machine import machine_facts, our_versions
from bench.scheduler.real_cluster import Answer, RealSite, Shape, running_real_site
from gearfall.core.ids import ModelName
from gearfall.simulation.arrivals import Lengths, Load, bursty_requests
from gearfall.simulation.figures import quantile
from gearfall.simulation.requests import Request

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_real.json"
POLICIES = ("ours", "random", "locality")
TARGET = 1.5

Samples = Mapping[str, list[list[Answer]]]
"""By policy, a list of answers for each round."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler real", description=__doc__)
    add_trace_flags(parser)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--warm-up", type=float, default=0.33, help="part of the trace, not counted"
    )
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gearfall-real-") as scratch:
        samples = asyncio.run(_measure(settings, Path(scratch)))
    _print(samples, settings.warm_up * settings.duration)
    settings.out.parent.mkdir(exist_ok=True)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "answers": {
            policy: [[asdict(each) for each in answers] for answers in rounds]
            for policy, rounds in samples.items()
        },
    }
    settings.out.write_text(json.dumps(document, indent=1))


def add_trace_flags(parser: argparse.ArgumentParser) -> None:
    """Add what shapes the trace and the cluster."""
    shape = Shape()
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--duration", type=float, default=36.0, help="seconds of the trace")
    parser.add_argument("--cv", type=float, default=2.0, help="of the gaps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=int, default=shape.models)
    parser.add_argument("--ssd-bytes-per-s", type=int, default=shape.ssd_bytes_per_s)
    parser.add_argument("--model-bytes", type=int, default=shape.model_bytes)
    parser.add_argument("--directory", type=Path, help="for the model; kept")


def shape_of(settings: argparse.Namespace) -> Shape:
    """Return the cluster that the flags ask for."""
    return Shape(
        models=settings.models,
        ssd_bytes_per_s=settings.ssd_bytes_per_s,
        model_bytes=settings.model_bytes,
    )


def trace_of(settings: argparse.Namespace, models: Sequence[ModelName]) -> tuple[Request, ...]:
    """Return the trace that the flags ask for."""
    prompt, output = Lengths(24, 0.3, 64), Lengths(40, 0.4, 120)
    load = Load(settings.rate, settings.duration, settings.cv, prompt, output, zipf=0.5)
    return bursty_requests(settings.seed, models, load)


async def teach(site: RealSite) -> None:
    """Start every model once from disk and once from memory: canaries, and what a start takes."""
    async with site.scheduled_by("ours"):
        for _ in range(2):
            for model in site.models:
                await site.client.generate(
                    model, [5] * 24, max_tokens=8, temperature=0.0, ignore_eos=True
                )
        await site.empty()


async def _measure(settings: argparse.Namespace, scratch: Path) -> Samples:
    home = settings.directory or scratch
    samples: dict[str, list[list[Answer]]] = {policy: [] for policy in settings.policies}
    async with running_real_site(home, scratch, shape_of(settings)) as site:
        await teach(site)
        requests = trace_of(settings, site.models)
        for number in range(settings.rounds):
            for policy in rotated(tuple(settings.policies), number):
                async with site.scheduled_by(policy):
                    samples[policy].append(await site.replay(requests))
                    await site.empty()
    return samples


def _print(samples: Samples, from_s: float) -> None:
    samples = {
        policy: [[each for each in answers if each.at_s >= from_s] for answers in rounds]
        for policy, rounds in samples.items()
    }
    console = Console()
    table = Table(box=box.SIMPLE)
    for name in ("policy", "requests", "first token p50 s", "p90", "p99", "p99 by round", "/ ours"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    ours = quantile(_first_tokens(samples["ours"]), 0.99) if "ours" in samples else 0.0
    for policy, rounds in samples.items():
        first = _first_tokens(rounds)
        p99_s = quantile(first, 0.99)
        by_round = (f"{quantile(_first_tokens([each]), 0.99):.2f}" for each in rounds)
        table.add_row(
            policy,
            str(len(first)),
            f"{quantile(first, 0.5):.2f}",
            f"{quantile(first, 0.9):.2f}",
            f"{p99_s:.2f}",
            " ".join(by_round),
            f"{p99_s / ours:.2f}" if ours else "-",
        )
    console.print(table)
    console.print(f"target: p99 of random and of locality at least {TARGET} times ours")


def _first_tokens(rounds: Sequence[Sequence[Answer]]) -> list[float]:
    return [each.first_token_s for answers in rounds for each in answers]
