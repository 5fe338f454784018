"""Starts predicted and real, and what the control plane adds: `python -m bench.scheduler starts`.

A real local cluster of one node; random Llamas of several sizes. Each round starts each model from
each tier, once alone and, from SSD, all sizes at once; the order rotates. Rounds that only
teach come first. error: |predicted - measured| / measured, of assignment to readiness. noise: how
far a start is from the median of its repeats, without waits behind others: so much is off whoever
knows them all. control plane: from the request's leaving the client until the store has the load in
hand, in all and hop by hop.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from bench.measuring.spread import rotated
from bench.scheduler.start_errors import errors, noise_floor
from bench.scheduler.starts_cluster import (
    MeasuredStart,
    Site,
    make_far,
    make_models,
    running_site,
)
from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from gearfall.simulation.fleet.figures import quantile

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_starts.json"
TARGET_P50, TARGET_P95, TARGET_CONTROL_S = 0.10, 0.25, 0.020


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler starts", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 0.4, 0.8, 1.5], help="GB")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--teaching", type=int, default=3, help="rounds before those that count")
    parser.add_argument("--threads", type=int, default=2, help="of an engine")
    parser.add_argument("--directory", type=Path, help="for the models; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gearfall-starts-") as scratch:
        home = settings.directory or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        starts = asyncio.run(_measure(settings, home, Path(scratch)))
    _print([each for each in starts if not each.teaches])
    settings.out.parent.mkdir(exist_ok=True)
    settings.out.write_text(
        json.dumps(
            {
                "machine": machine_facts(),
                "versions": our_versions(),
                "settings": {k: str(v) for k, v in vars(settings).items()},
                "starts": [asdict(each) for each in starts],
            },
            indent=1,
        )
    )


async def _measure(settings: argparse.Namespace, home: Path, scratch: Path) -> list[MeasuredStart]:
    near = make_models(home, settings.sizes)
    far = make_far(home, near)
    found: list[MeasuredStart] = []
    async with running_site(scratch, near, far, settings.threads) as site:
        for number in range(settings.teaching + settings.rounds):
            seen = await _one_round(site, _turned(near, number), _turned(far, number))
            found += (replace(each, teaches=number < settings.teaching) for each in seen)
    return found


def _turned(models: Iterable[ModelName], by: int) -> Sequence[ModelName]:
    return tuple(map(ModelName, rotated(tuple(models), by)))


async def _one_round(
    site: Site, near: Sequence[ModelName], far: Sequence[ModelName]
) -> list[MeasuredStart]:
    seen = []
    for model in near:
        await site.drop_from_memory(model)
        for _ in (Tier.SSD, Tier.DRAM):
            seen.append(await site.start(model))
            await site.wait_gone([model])
    for model in near:
        await site.drop_from_memory(model)
    at_once = (site.start(model, beside=len(near) - 1) for model in near)
    seen += await asyncio.gather(*at_once)
    await site.wait_gone(near)
    for model in far:
        # The disk holds one of them: the one before it pushed this one out.
        await site.drop_from_memory(model)
        seen.append(await site.start(model))
        await site.wait_gone([model])
    return seen


def _print(starts: Sequence[MeasuredStart]) -> None:
    table = Table(
        "from", "at once", "starts", "real s", "error p50", "p95", "noise p50", "p95",
        "plane ms p50", "p99", box=box.SIMPLE, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for tier, beside in sorted({(each.tier, each.beside) for each in starts}):
        rows = [each for each in starts if (each.tier, each.beside) == (tier, beside)]
        control_ms = [1000 * each.control_plane_s for each in rows]
        table.add_row(
            tier,
            str(beside + 1),
            str(len(rows)),
            f"{median(each.measured_s for each in rows):.3f}",
            *_shares(errors(rows)),
            *_shares(noise_floor(rows)),
            f"{quantile(control_ms, 0.5):.1f}",
            f"{quantile(control_ms, 0.99):.1f}",
        )
    console = Console()
    console.print(table)
    console.print(_hops_table(starts))
    noise_p50, noise_p95 = _shares(noise_floor(starts))
    console.print(f"noise p50: {noise_p50}, p95: {noise_p95}", highlight=False)
    control_s = [each.control_plane_s for each in starts]
    figures = (
        ("error p50", quantile(errors(starts), 0.5), TARGET_P50),
        ("error p95", quantile(errors(starts), 0.95), TARGET_P95),
        ("control plane s p50", quantile(control_s, 0.5), TARGET_CONTROL_S),
        ("control plane s p99", quantile(control_s, 0.99), TARGET_CONTROL_S),
    )
    for name, figure, target in figures:
        said = "met" if figure < target else "missed"
        console.print(f"{name}: {figure:.3f} (< {target:g} {said})", highlight=False)


def _hops_table(starts: Sequence[MeasuredStart]) -> Table:
    table = Table("hop", "at once", "p50 ms", "p99 ms", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for beside in sorted({each.beside for each in starts}):
        rows = [each.hops for each in starts if each.beside == beside]
        for hop in dict.fromkeys(hop for each in rows for hop in each):
            spent_ms = [1000 * each[hop] for each in rows if hop in each]
            p50, p99 = (f"{quantile(spent_ms, share):.1f}" for share in (0.5, 0.99))
            table.add_row(hop, str(beside + 1), p50, p99)
    return table


def _shares(values: Sequence[float]) -> tuple[str, str]:
    if not values:
        return "", ""
    return f"{quantile(values, 0.5):.1%}", f"{quantile(values, 0.95):.1%}"


if __name__ == "__main__":
    main()
