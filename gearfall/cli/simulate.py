"""`gearfall simulate`: a fleet in simulated time, under several policies side by side."""

import csv
import gzip
import io
import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson
from gearfall.cli.render import console, print_json
from gearfall.cli.simulate_table import figures_table
from gearfall.core.errors import InvalidRequest
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.arrivals import Bursts, TraceRow, spread_trace
from gearfall.simulation.fleet.figures import Figures, figures_of
from gearfall.simulation.fleet.fleet_setting import FleetShape, fleet_site
from gearfall.simulation.fleet.scenario import Run, Scenario, policy_names, simulate
from gearfall.simulation.fleet.serverlessllm import LENGTHS, SIZES, serverlessllm


def simulate_command(
    size: Annotated[str, typer.Option(help=f"OPT size: {', '.join(SIZES)}.")] = "6.7b",
    dataset: Annotated[str, typer.Option(help=f"Lengths: {', '.join(LENGTHS)}.")] = "gsm8k",
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second.")] = 0.8,
    duration: Annotated[float, typer.Option(min=1, help="Simulated seconds.")] = 1200.0,
    bursts: Annotated[Bursts, typer.Option(help="What comes in bursts.")] = Bursts.FLEET,
    ssd_copies: Annotated[int, typer.Option(min=1, help="Nodes that hold each model.")] = 4,
    dram_copies: Annotated[
        int, typer.Option(min=0, help="Of each model that fit into memory; 0: 256 GB a node.")
    ] = 0,
    slots: Annotated[
        int, typer.Option(min=0, help="Requests a replica answers at once; 0: what fits, to 16.")
    ] = 1,
    is_filled: Annotated[
        bool, typer.Option("--dram-filled/--dram-empty", help="At the beginning.")
    ] = True,
    trace: Annotated[
        Path | None, typer.Option(help="Replay this .csv.gz trace on a fleet instead.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="With --trace: nodes.")] = 10,
    models: Annotated[int, typer.Option(min=1, help="With --trace: models.")] = 100,
    speed_up: Annotated[float, typer.Option(min=0.001, help="With --trace: times as dense.")] = 1.0,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(policy_names())}.")
    ] = None,
    residency: Annotated[
        float | None, typer.Option(min=0, help="Times its start that a replica stays.")
    ] = None,
    slo: Annotated[float, typer.Option(min=0, help="Seconds to the first token.")] = 5.0,
    seed: Annotated[int, typer.Option()] = 0,
    plots: Annotated[Path | None, typer.Option(help="Directory for plots.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the figures as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a fleet under each policy and compare: latency, preemptions, bytes, cost.

    Without --trace: ServerlessLLM's setting, 4 nodes of 4 accelerators. Same arguments, same
    figures.
    """
    policies = _policies(policy)
    if trace is None:
        scenario = _paper_setting(
            size,
            dataset,
            rate,
            duration,
            bursts=bursts,
            copies=(ssd_copies, dram_copies),
            slots=slots,
            is_filled=is_filled,
            seed=seed,
        )
    else:
        shape = FleetShape(nodes=nodes, models=models, slots=max(1, slots))
        scenario = _trace_setting(trace, shape, speed_up, duration, seed)
    if residency is not None:
        changed = replace(scenario.policy, residency_per_start=residency)
        scenario = replace(scenario, policy=changed)
    runs = _run(scenario, policies)
    figures = [figures_of(run, slo) for run in runs]
    _report(scenario, figures, slo, as_json=as_json, out=out)
    if plots is not None:
        # matplotlib is an extra: nobody else needs it.
        from gearfall.cli.simulate_plots import write_plots

        for path in write_plots(plots, scenario.name, runs):
            console.print(f"wrote {path}")


def _policies(given: list[str] | None) -> list[str]:
    known = policy_names()
    for name in given or ():
        if name not in known:
            raise InvalidRequest(f"--policy {name!r}: known are {', '.join(known)}", param="policy")
    return given or list(known)


def _run(scenario: Scenario, policies: list[str]) -> list[Run]:
    runs = []
    for name in policies:
        with console.status(f"{name} ({len(scenario.requests)} requests)"):
            runs.append(simulate(scenario, name))
    return runs


def _report(
    scenario: Scenario, figures: list[Figures], slo_s: float, *, as_json: bool, out: Path | None
) -> None:
    document = {
        "scenario": scenario.name,
        "seed": scenario.seed,
        "requests": len(scenario.requests),
        "slo_s": slo_s,
        "policies": [asdict(each) for each in figures],
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n")
    if as_json:
        print_json(document)
    else:
        console.print(f"{scenario.name}; {len(scenario.requests)} requests, seed {scenario.seed}")
        console.print(figures_table(figures, slo_s))


def _paper_setting(
    size: str,
    dataset: str,
    rate: float,
    duration_s: float,
    *,
    bursts: Bursts,
    copies: tuple[int, int],
    slots: int,
    is_filled: bool,
    seed: int,
) -> Scenario:
    if size not in SIZES:
        raise InvalidRequest(f"--size {size!r}: known are {', '.join(SIZES)}", param="size")
    if dataset not in LENGTHS:
        known = ", ".join(LENGTHS)
        raise InvalidRequest(f"--dataset {dataset!r}: known are {known}", param="dataset")
    return serverlessllm(
        size,
        dataset,
        per_s=rate,
        duration_s=duration_s,
        seed=seed,
        slots=slots,
        ssd_copies=copies[0],
        dram_copies=copies[1],
        bursts=bursts,
        is_filled=is_filled,
    )


def _trace_setting(
    path: Path, shape: FleetShape, speed_up: float, duration_s: float, seed: int
) -> Scenario:
    rows = read_trace(path)
    scaled = [replace(row, at_s=row.at_s / speed_up) for row in rows]
    kept = [row for row in scaled if row.at_s <= duration_s]
    site = fleet_site(shape)
    names = [each.record.name for each in site.models]
    requests = spread_trace(seed, kept, names, most_output=1024)
    name = f"{path.name} on {shape.nodes} nodes, {shape.models} models"
    return Scenario(name, site, requests, SchedulerPolicy(), seed)


_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp_ms", "input_length", "output_length")


def read_trace(path: Path) -> list[TraceRow]:
    """Return a trace's rows, the first at 0 s; Azure's and Mooncake's columns are known.

    Raises InvalidRequest for a file that is not there or not such a table.
    """
    try:
        with gzip.open(path, "rt", newline="") as file:
            text = file.read()
    except OSError as error:
        raise InvalidRequest(f"--trace {path}: {error}", param="trace") from error
    reader = csv.DictReader(io.StringIO(text))
    columns = reader.fieldnames or ()
    known = next((each for each in (_AZURE, _MOONCAKE) if set(each) <= set(columns)), None)
    if known is None:
        raise InvalidRequest(f"--trace {path}: has columns {', '.join(columns)}", param="trace")
    try:
        rows = [_row(line, known) for line in reader]
    except ValueError as error:
        raise InvalidRequest(f"--trace {path}: {error}", param="trace") from error
    first_s = min((row.at_s for row in rows), default=0.0)
    return [replace(row, at_s=row.at_s - first_s) for row in rows]


def _row(line: dict[str, str], columns: tuple[str, str, str]) -> TraceRow:
    at, prompt, output = (line[column] for column in columns)
    if columns is _MOONCAKE:
        at_s = float(at) / 1000.0
    else:
        # Seven digits after the point are one more than datetime reads.
        at_s = datetime.fromisoformat(f"{at[:26]}+00:00").timestamp()
    return TraceRow(at_s, int(prompt), int(output))
