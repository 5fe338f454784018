"""`gearfall plan`: gears for every level of load, from a profile and the workers that there are."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import console, print_json, print_table, seconds_text
from gearfall.client import Client
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import Gear, GearPlan, plan_diff, plan_text
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.profile import Profile, parse_profile

if TYPE_CHECKING:  # the extra `planner` brings its libraries; the other commands do without
    from gearfall.gears.placement import Host
    from gearfall.simulation.cascades.profile_plan import PlanRequest


def plan(
    profile: Annotated[Path | None, typer.Argument(help="From `gearfall profile`.")] = None,
    name: Annotated[str, typer.Option(help="Deployment that follows the plan.")] = "cascade",
    quality: Annotated[
        float | None, typer.Option(help="Share of right answers to certify at every load.")
    ] = None,
    loss: Annotated[
        float | None,
        typer.Option(help="Quality that may be lost against the best model, to certify."),
    ] = None,
    p95_s: Annotated[
        float | None, typer.Option("--p95", help="Seconds, of whole answers, at every load.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Chance that the quality is missed.")] = 0.05,
    load: Annotated[
        list[float] | None, typer.Option(help="Highest tokens a second of each gear; repeatable.")
    ] = None,
    cv: Annotated[float, typer.Option(help="Burstiness: CV of the gaps between requests.")] = 2.0,
    keep_alive: Annotated[
        float,
        typer.Option(min=0, help="Seconds after which an idle model leaves; default: it stays."),
    ] = math.inf,
    requests: Annotated[int, typer.Option(min=50, help="Simulated for each gear.")] = 1000,
    hold_tokens: Annotated[
        int,
        typer.Option(help="Decide stages on so many first tokens, as stream mode early does."),
    ] = 0,
    samples: Annotated[
        int,
        typer.Option(
            help="Let stages ask so often and count the answers that are the same, where that is "
            "cheaper; prints the plan without it too. 0: none does."
        ),
    ] = 0,
    calibrate: Annotated[bool, typer.Option(help="Map certainty to P(right).")] = True,
    out: Annotated[Path | None, typer.Option(help="Where the plan goes.")] = None,
    show: Annotated[Path | None, typer.Option(help="Print a plan that is there.")] = None,
    diff: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Print what changed between two plans.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Directory for plots of the plan, as SVG and PNG.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="With --plots: show the gears on this .csv.gz trace, not on a day."),
    ] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Plan gears for a running cluster's workers, show a plan, or compare two."""
    if diff is not None:
        _print_diff(*(parse_plan(path.read_bytes()) for path in diff), as_json=as_json)
        return
    if show is not None:
        print_plan(parse_plan(show.read_bytes()), as_json=as_json)
        return
    if profile is None:
        raise InvalidRequest("name a profile, or --show, or --diff")
    from gearfall.gears.plan_build import Target
    from gearfall.simulation.cascades.profile_plan import PlanRequest, plan_from_profile

    target = Target(quality=quality, loss=loss, p95_s=p95_s, delta=delta)
    version = parse_plan(out.read_bytes()).version + 1 if out and out.exists() else 1
    request = PlanRequest(
        name, version, time.time(), target, tuple(load or ()), is_calibrated=calibrate,
        hold_tokens=hold_tokens, samples=samples, requests=requests, cv=cv,
        keep_alive_s=keep_alive,
    )  # fmt: skip
    measured = parse_profile(profile.read_bytes())
    with connect(server) as client:
        hosts = hosts_of(client)
    made = plan_from_profile(measured, hosts, request)
    if out is not None:
        incoming = out.with_name(f"{out.name}.incoming")
        incoming.write_text(plan_text(made))
        incoming.replace(out)
    print_plan(made, as_json=as_json)
    if samples and not as_json:
        _print_without(measured, hosts, request)
    if plots is not None:
        written = _plot(plots, made, measured, hosts, trace, cv)
        if not as_json:
            console.print(f"{len(written)} plots in {plots}", highlight=False)


def _plot(
    directory: Path,
    plan: GearPlan,
    profile: Profile,
    hosts: "dict[Host, str]",
    trace: Path | None,
    cv: float,
) -> list[Path]:
    """Draw a plan that was just made."""
    from gearfall.cli.plan_plots import write_plan_plots
    from gearfall.cli.simulate import read_trace
    from gearfall.simulation.cascades.plan_day import made_up_day, moments, run_day, scaled_trace

    if trace is None:
        times_s = made_up_day(plan, profile, cv=cv)
    else:
        times_s = scaled_trace(plan, profile, [row.at_s for row in read_trace(trace)])
    run = run_day(plan, profile, hosts, times_s)
    return write_plan_plots(directory, plan, profile, moments(run, plan, profile))


def hosts_of(client: Client) -> "dict[Host, str]":
    """Return the running cluster's workers with their device kinds."""
    from gearfall.gears.placement import Host

    return {
        Host(each.worker_id, each.node_id, each.memory_bytes, each.max_replicas): each.device
        for each in client.status().workers
        if each.max_replicas > 0
    }


def print_plan(plan: GearPlan, *, as_json: bool) -> None:
    """Print a plan's gears, placement and assumptions."""
    if as_json:
        print_json({"plan": plan_text(plan)})
        return
    _print_gears(f"{plan.name} version {plan.version}: {plan.target}", plan)
    for placed in plan.placement:
        console.print(f"  {placed.node}: {placed.count} x {placed.model}", highlight=False)
    for line in plan.assumptions:
        console.print(f"  assumes: {line}", highlight=False)


def _print_without(profile: Profile, hosts: "dict[Host, str]", request: "PlanRequest") -> None:
    """Print what the plan would be if no stage counted equal answers."""
    from gearfall.simulation.cascades.profile_plan import plan_from_profile

    title = "the same without stages that count equal answers"
    try:
        made = plan_from_profile(profile, hosts, replace(request, samples=0))
    except InvalidRequest as error:
        console.print(f"{title}: {error.message}", highlight=False)
    else:
        _print_gears(title, made)


def _print_gears(title: str, plan: GearPlan) -> None:
    print_table(
        title,
        ("load, tokens/s>", "cascade", "quality>", "certified>", f"{plan.cost_unit}>", "p95>"),
        [
            (
                f"{gear.max_load:.0f}",
                _stages_text(gear),
                f"{gear.promise.quality:.3f}",
                _certified_text(gear),
                f"{gear.promise.cost:.3g}",
                seconds_text(gear.promise.p95_s),
            )
            for gear in plan.gears
        ],
    )


def _certified_text(gear: Gear) -> str:
    """Return what holds with probability 1 - delta: a share, a loss, or both."""
    promise = gear.promise
    lost = "" if promise.loss_bound is None else f"loss <= {promise.loss_bound:g}"
    share = f"{promise.quality_bound:.3f}" if promise.quality_bound else ""
    return " ".join(filter(None, (share, lost))) or "-"


def _stages_text(gear: Gear) -> str:
    """Return a cascade in one line: small <0.900> large."""
    bounds = [f" <{each.threshold:.3f}>" if each.threshold else "" for each in gear.stages]
    pairs = zip(gear.stages, bounds, strict=True)
    return " ".join(f"{stage}{bound}" for stage, bound in pairs)


def _print_diff(old: GearPlan, new: GearPlan, *, as_json: bool) -> None:
    lines = plan_diff(old, new)
    if as_json:
        print_json({"differences": list(lines)})
    for line in () if as_json else lines or ("the plans are the same",):
        console.print(line, highlight=False)
