"""`gearfall profile`: measure models on the running cluster, or import measurements."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress

from gearfall.cli.connection import AsJson, Server, api_key, connect
from gearfall.cli.render import console, print_json, print_table, seconds_text
from gearfall.client import AsyncClient
from gearfall.core.certainty.certainty import measure_certainty
from gearfall.core.certainty.self_consistency import MAX_SAMPLES
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import Generation, Profile, ProfiledModel, parse_profile, profile_text
from gearfall.profiling.csv_import import import_csv
from gearfall.profiling.measure import MeasureSettings, profile_model
from gearfall.profiling.overheads import with_common_overheads
from gearfall.profiling.queries import LabelledQuery, agreement_rule, parse_queries


def profile(
    model: Annotated[list[str] | None, typer.Argument(help="Models to measure.")] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Labelled queries: JSON lines with prompt and answer.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes.")] = None,
    from_csv: Annotated[
        Path | None, typer.Option(help="Import instead: query, model, correct, confidence, cost.")
    ] = None,
    cost_unit: Annotated[str, typer.Option(help="Unit of the imported costs.")] = "FLOP",
    show: Annotated[Path | None, typer.Option(help="Print a profile that is there.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Queries asked at the same time.")] = 8,
    samples: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_SAMPLES - 1, help="Answers drawn beside each one, to count equal ones."
        ),
    ] = 0,
    starts: Annotated[
        int, typer.Option(min=0, help="Times that each model is let go and started again.")
    ] = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Directory for reliability diagrams; prints all signals beside them."),
    ] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Measure how fast models compute and how well and how certainly they answer."""
    if show is not None:
        made = parse_profile(show.read_bytes())
    elif from_csv is not None:
        text = from_csv.read_text()
        made = import_csv(text, made_unix_s=time.time(), cost_unit=cost_unit)
    else:
        if not model or queries is None:
            raise InvalidRequest("name models and --queries, or --from-csv, or --show")
        asked = parse_queries(queries.read_text().splitlines())
        settings = MeasureSettings(max_tokens, at_once, samples, starts=starts)
        address = _address(server)
        made = asyncio.run(measure_models(address, model, asked, settings, quiet=as_json))
    if out is not None:
        _write(out, profile_text(made))
    _print(made, out, as_json=as_json)
    if report is not None:
        _report(made, report, quiet=as_json)


def _report(made: Profile, directory: Path, *, quiet: bool) -> None:
    """Compare all signals of the profile, and draw how far the certainties can be believed."""
    from gearfall.cli.reliability_plots import write_reliability  # extras `planner` and `plots`
    from gearfall.cli.signal_table import print_signals
    from gearfall.gears.profile_answers import shuffled
    from gearfall.gears.signals import compare_signals

    found = compare_signals(made, shuffled(made))
    written = write_reliability(directory, found)
    (directory / "signals.json").write_bytes(msgspec.json.encode(found))
    if not quiet:
        print_signals(found)
        console.print(f"{len(written)} diagrams in {directory}", highlight=False)


def _address(server: str) -> str:
    with connect(server) as client:
        return client.address


async def measure_models(
    address: str,
    models: Sequence[str],
    queries: Sequence[LabelledQuery],
    settings: MeasureSettings,
    *,
    quiet: bool,
) -> Profile:
    """Return the profile of models on a running cluster, one after the other, with a bar each."""
    found: list[ProfiledModel] = []
    async with AsyncClient(address, api_key=api_key()) as client:
        with Progress(console=console, disable=quiet) as bars:
            for name in models:
                total = len(queries) + len(settings.speed.batches) + settings.starts
                bar = bars.add_task(f"profiling {name}", total=total)
                advance = partial(bars.advance, bar)
                found.append(await profile_model(client, name, queries, settings, advance))
    names = tuple(query.name for query in queries)
    return Profile(
        time.time(),
        "FLOP",
        names,
        with_common_overheads(found),
        agreement_rule=agreement_rule(queries),
        drawn_temperature=settings.temperature,
    )


def _write(path: Path, content: bytes) -> None:
    """A profile is there whole or not at all."""
    incoming = path.with_name(f"{path.name}.incoming")
    incoming.write_bytes(content)
    incoming.replace(path)


def _print(made: Profile, out: Path | None, *, as_json: bool) -> None:
    rows = [_row(each) for each in made.models]
    if as_json:
        found = [asdict(row) for row in rows]
        print_json({"queries": len(made.queries), "models": found, "out": str(out or "")})
        return
    print_table(
        f"{len(made.queries)} queries" + (f", written to {out}" if out else ""),
        ("model", "right>", f"{made.cost_unit}>", "tokens>", "step>", "per job>", "AUROC>"),
        [
            (
                row.model,
                f"{row.quality:.3f}",
                f"{row.cost:.3g}",
                f"{row.output_tokens:.1f}",
                "-" if row.step_s is None else seconds_text(row.step_s),
                "-" if row.step_s_per_job is None else seconds_text(row.step_s_per_job),
                "-" if row.auroc is None else f"{row.auroc:.3f}",
            )
            for row in rows
        ],
    )


@dataclass(frozen=True, slots=True)
class _Row:
    model: str
    quality: float
    cost: float
    output_tokens: float
    step_s: float | None
    step_s_per_job: float | None
    auroc: float | None
    """Of the plain certainty, where both right and wrong answers are there."""


def _row(model: ProfiledModel) -> _Row:
    count = max(1, len(model.generations))
    speed = next(iter(model.speeds.values()), None)
    return _Row(
        model.name,
        sum(each.quality for each in model.generations) / count,
        sum(each.cost for each in model.generations) / count,
        sum(each.output_tokens for each in model.generations) / count,
        speed.step_s if speed else None,
        speed.step_s_per_job if speed else None,
        _auroc(model),
    )


def _auroc(model: ProfiledModel) -> float | None:
    import numpy as np

    from gearfall.gears.calibrate import reliability  # the extra `planner` brings its library

    certainty = np.array([_plain_certainty(each) for each in model.generations])
    quality = np.array([each.quality for each in model.generations])
    if set(quality) != {0.0, 1.0}:
        return None
    return reliability(certainty, quality).auroc


def _plain_certainty(each: Generation) -> float:
    if each.certainty is not None:
        return each.certainty
    return measure_certainty("sequence_probability", each.logprobs, each.margins)
