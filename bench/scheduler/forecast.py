"""Which forecast fetches ahead best: `python -m bench.scheduler forecast`. Replays real arrivals.

A fleet is made out of each trace (`forecast_fleet.py`) and served by nodes whose pools hold half of
it (`forecast_replay.py`), once without prefetch and once with each forecast. Counts, not times: the
same seed gives the same figures on any machine.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.scheduler.forecast_fleet import AZURE, KINDS, MOONCAKE, TRACES, make_arrivals, read_times
from bench.scheduler.forecast_replay import Replay, Site, Tally
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import ModelRecord
from gearfall.scheduling.prefetching.forecast import Forecast

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_forecast.json"
POLICIES: tuple[Forecast | None, ...] = (None, *Forecast)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one fleet."""

    trace: str
    kind: str
    policy: str
    requests: int
    starts: int
    from_pool: int
    load_mean_s: float
    load_p99_s: float
    prefetched: int
    prefetched_used: int
    prefetched_gb: float
    demand_gb: float

    @property
    def from_ssd(self) -> int:
        """Starts that had to read their bytes first."""
        return self.starts - self.from_pool


def main(argv: Sequence[str] | None = None) -> int:
    """Replay, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler forecast", description=__doc__)
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--days", type=int, default=5, help="the first only teaches")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--traces", nargs="+", default=[*AZURE, MOONCAKE])
    parser.add_argument("--directory", type=Path, default=TRACES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    if not settings.directory.is_dir():
        sys.stderr.write(f"skipped: the traces are not at {settings.directory}\n")
        return 1
    rows = [
        row
        for trace in settings.traces
        for kind in KINDS
        for row in replay_all(
            read_times(trace, settings.directory),
            trace=trace,
            kind=kind,
            models=settings.models,
            days=settings.days,
            seed=settings.seed,
        )
    ]
    _print(rows)
    settings.out.parent.mkdir(exist_ok=True)
    shown = {k: str(v) for k, v in vars(settings).items() if k not in {"directory", "out"}}
    document = {"settings": shown, "site": asdict(Site()), "rows": [asdict(row) for row in rows]}
    settings.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def replay_all(
    times_s: np.ndarray, *, trace: str, kind: str, models: int, days: int, seed: int
) -> list[Row]:
    """Return a row for each policy over the same arrivals."""
    records = make_models(models, Site(), seed)
    names = [each.name for each in records]
    arrivals, day_s = make_arrivals(times_s, names, kind=kind, days=days, seed=seed)
    return [
        _row(trace, kind, policy, Replay(Site(), records, policy, day_s=day_s).run(arrivals))
        for policy in POLICIES
    ]


def make_models(count: int, site: Site, seed: int) -> list[ModelRecord]:
    """Return models of 2 to 26 GB that every node has on its SSD."""
    sizes = np.random.default_rng(seed).choice([2, 4, 8, 13, 26], size=count) * 10**9
    nodes = tuple(NodeId(f"node-{n}") for n in range(site.nodes))
    return [
        ModelRecord(
            ModelName(f"model-{n}"),
            "",
            "LlamaForCausalLM",
            int(size) // 2,
            int(size),
            4096,
            32000,
            None,
            (2,),
            "/models",
            nodes,
            "bfloat16",
        )
        for n, size in enumerate(sizes)
    ]


def _row(trace: str, kind: str, policy: Forecast | None, tally: Tally) -> Row:
    loads = np.asarray(tally.load_s or [0.0])
    return Row(
        trace=trace,
        kind=kind,
        policy=policy.value if policy else "none",
        requests=tally.requests,
        starts=tally.starts,
        from_pool=tally.from_pool,
        load_mean_s=round(float(loads.mean()), 4),
        load_p99_s=round(float(np.quantile(loads, 0.99)), 3),
        prefetched=tally.prefetched,
        prefetched_used=tally.prefetched_used,
        prefetched_gb=round(tally.prefetched_bytes / 1e9, 1),
        demand_gb=round(tally.demand_bytes / 1e9, 1),
    )


def _print(rows: Sequence[Row]) -> None:
    table = Table(box=box.SIMPLE, title="starts of models that were down, after the first day")
    for column in ("trace", "fleet", "policy"):
        table.add_column(column)
    for column in ("starts", "from SSD", "load mean s", "p99 s", "fetched", "used", "GB ahead"):
        table.add_column(column, justify="right")
    for row in rows:
        used = f"{row.prefetched_used / row.prefetched:.0%}" if row.prefetched else "-"
        table.add_row(
            row.trace[:24],
            row.kind,
            row.policy,
            str(row.starts),
            str(row.from_ssd),
            f"{row.load_mean_s:.3f}",
            f"{row.load_p99_s:.2f}",
            str(row.prefetched),
            used,
            f"{row.prefetched_gb:.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    sys.exit(main())
