"""`gearfall bench`: a closed-loop load on a running cluster, with latency percentiles."""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.progress import Progress

from gearfall.cli.connection import AsJson, Server, api_key, connect
from gearfall.cli.render import console, print_json, print_table, seconds_text
from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.request import Options
from gearfall.core.errors import GearfallError, Unavailable
from gearfall.simulation.fleet.figures import quantile


@dataclass(frozen=True, slots=True)
class Sample:
    """One request of the load."""

    first_text_s: float
    total_s: float
    completion_tokens: int
    epochs: int


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What a load measured; times in seconds."""

    requests: int
    failed: int
    concurrency: int
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    first_text_p50_s: float
    first_text_p95_s: float
    total_p50_s: float
    total_p95_s: float
    total_p99_s: float
    restarted: int
    """Requests that lost an owner on the way and were answered all the same."""


def bench(
    model: Annotated[str, typer.Argument(help="A deployment or a model.")],
    prompt: Annotated[str, typer.Option(help="Prompt of every request.")] = "123+45=",
    requests: Annotated[int, typer.Option(min=1)] = 200,
    concurrency: Annotated[int, typer.Option(min=1, max=1024)] = 16,
    max_tokens: Annotated[int, typer.Option(min=1)] = 32,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Send requests over gRPC, so many at once, and print latency and throughput."""
    with connect(server) as client:
        address = client.address
    options: Options = {"max_tokens": max_tokens, "temperature": 0.0}
    report = asyncio.run(
        _run(address, model, prompt, options, requests, concurrency, quiet=as_json)
    )
    if as_json:
        print_json(asdict(report))
        return
    print_table(
        f"{model}: {report.requests} requests, {report.concurrency} at once, "
        f"{report.failed} failed, {report.restarted} restarted on the way",
        ("requests/s>", "tokens/s>", "first text p50>", "p95>", "total p50>", "p95>", "p99>"),
        [
            (
                f"{report.requests_per_s:.1f}",
                f"{report.tokens_per_s:.1f}",
                *(
                    seconds_text(value)
                    for value in (
                        report.first_text_p50_s,
                        report.first_text_p95_s,
                        report.total_p50_s,
                        report.total_p95_s,
                        report.total_p99_s,
                    )
                ),
            )
        ],
    )


async def _run(
    address: str,
    model: str,
    prompt: str,
    options: Options,
    requests: int,
    concurrency: int,
    *,
    quiet: bool,
) -> BenchReport:
    samples: list[Sample] = []
    failures: list[GearfallError] = []
    left = iter(range(requests))
    async with AsyncClient(address, api_key=api_key()) as client:
        with Progress(console=console, disable=quiet) as bars:
            task = bars.add_task(f"asking {model}", total=requests)

            async def ask_until_done() -> None:
                for _ in left:
                    try:
                        samples.append(await _measure(client, model, prompt, options))
                    except GearfallError as error:
                        failures.append(error)
                    bars.advance(task)

            begin = time.perf_counter()
            await asyncio.gather(*(ask_until_done() for _ in range(concurrency)))
            wall_s = time.perf_counter() - begin
    if not samples:
        raise Unavailable(f"all {requests} requests failed, the first with: {failures[0]}")
    return _report(samples, len(failures), concurrency, wall_s)


async def _measure(client: AsyncClient, model: str, prompt: str, options: Options) -> Sample:
    begin = time.perf_counter()
    first_text_s = 0.0
    end: Finished | None = None
    async for event in client.stream(model, prompt, **options):
        if isinstance(event, TextDelta) and not first_text_s:
            first_text_s = time.perf_counter() - begin
        elif isinstance(event, Finished):
            end = event
    if end is None:
        raise Unavailable("a stream ended without its last event")
    total_s = time.perf_counter() - begin
    epochs = max((stage.epochs for stage in end.stages), default=1)
    return Sample(first_text_s or total_s, total_s, end.usage.completion_tokens, epochs)


def _report(samples: list[Sample], failed: int, concurrency: int, wall_s: float) -> BenchReport:
    first = [sample.first_text_s for sample in samples]
    total = [sample.total_s for sample in samples]
    return BenchReport(
        requests=len(samples) + failed,
        failed=failed,
        concurrency=concurrency,
        wall_s=wall_s,
        requests_per_s=len(samples) / wall_s,
        tokens_per_s=sum(sample.completion_tokens for sample in samples) / wall_s,
        first_text_p50_s=quantile(first, 0.50),
        first_text_p95_s=quantile(first, 0.95),
        total_p50_s=quantile(total, 0.50),
        total_p95_s=quantile(total, 0.95),
        total_p99_s=quantile(total, 0.99),
        restarted=sum(sample.epochs > 1 for sample in samples),
    )
