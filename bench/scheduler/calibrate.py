"""The simulator against a real cluster on one trace: `python -m bench.scheduler calibrate`.

The real one is that of `bench.scheduler real` under our policy. Its profile is measured there:
bandwidths, starts and exits as its own records tell them, prompts and steps by requests of their
own. A simulated replica computes as fast whatever the others do, and here all share one machine's
processors: so all is measured beside as many running answers as the trace has on average, by its
lengths and its rate. Then the same trace runs in a simulated cluster of that profile; no time
measured under the trace goes into the profile.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from bench.measuring.machine import machine_facts, our_versions
from bench.scheduler.company import answering, company_of, step_in_company
from bench.scheduler.real import teach
from bench.scheduler.real_cluster import Answer, RealSite, Shape, running_real_site
from bench.scheduler.real_traces import TRACES, add_trace_flags, requests_of, trace_of
from gearfall.core.ids import ModelName, WorkerId
from gearfall.core.records import ReplicaState
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.scheduling.scaling.autoscaler import SchedulerPolicy
from gearfall.simulation.fleet.figures import quantile
from gearfall.simulation.fleet.scenario import Run, Scenario, simulate
from gearfall.simulation.requests import Request
from gearfall.simulation.site import (
    EngineSpeed,
    ModelProfile,
    NodeProfile,
    Site,
    Timing,
    WorkerProfile,
)

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_calibrate.json"
_PROBES = 3
_SHORT, _LONG, _TOKENS = 8, 264, 33


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of the real cluster before the trace."""

    company: int
    """Answers that ran elsewhere meanwhile."""
    ssd_bytes_per_s: float
    start_s: float
    """Of a start from memory."""
    exit_s: float
    """From an idle replica's taking back until it is gone."""
    overhead_s: float
    """From the client's sending to the first token, beside the prompt's computation."""
    prefill_s_per_token: float
    step_s: float
    step_s_per_job: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, simulate, print both, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler calibrate", description=__doc__)
    parser.add_argument("--trace", choices=list(TRACES), default="skewed")
    add_trace_flags(parser)
    parser.set_defaults(duration=60.0)
    parser.add_argument("--directory", type=Path, help="for the model; kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    settings = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="gearfall-calibrate-") as scratch:
        profile, scenario, answers = asyncio.run(_measure(settings, Path(scratch)))
    run = simulate(scenario, "ours")
    _print(profile, answers, run)
    settings.out.parent.mkdir(exist_ok=True)
    document = {
        "machine": machine_facts(),
        "versions": our_versions(),
        "settings": {name: str(value) for name, value in vars(settings).items()},
        "profile": asdict(profile),
        "real": [asdict(each) for each in answers],
        "simulated": [asdict(each) for each in run.outcomes],
    }
    settings.out.write_text(json.dumps(document, indent=1))


async def _measure(
    settings: argparse.Namespace, scratch: Path
) -> tuple[Profile, Scenario, list[Answer]]:
    home, trace = settings.directory or scratch, trace_of(settings.trace, settings)
    async with running_real_site(home, scratch, trace.shape) as site:
        await teach(site)
        company = company_of(trace)
        step_s = await step_in_company(site, company)
        requests = requests_of(trace, site.models, trace.shape.load_s / step_s, settings.seed)
        profile = await _profile(site, company)
        await site.fill()
        scenario = _scenario(site, profile, requests, trace.shape)
        async with site.scheduled_by("ours"):
            answers = await site.replay(requests)
    return profile, scenario, answers


async def _profile(site: RealSite, company: int) -> Profile:
    """Start models from disk and from memory, and time prompts and steps on a warm one."""
    busy, others = site.models[:company], site.models[company:]
    async with site.scheduled_by("ours"), exits_of(site) as exits:
        async with answering(site, busy):
            starts: list[StartTimeline] = []
            for model in (*others, *others):
                await site.probe(model, _SHORT, 2)
                starts += _starts(site, model)
            warm = others[-1]
            short = [await site.probe(warm, _SHORT, _TOKENS) for _ in range(_PROBES)]
            long = [await site.probe(warm, _LONG, 2) for _ in range(_PROBES)]
            both = [each for _ in range(_PROBES) for each in await _two(site, warm)]
        await site.empty()
    from_disk = [each.ssd_s for each in starts if each.from_tier is Tier.SSD and each.ssd_s > 0]
    from_memory = [each.total_s for each in starts if each.from_tier is Tier.DRAM]
    size_bytes = site.cluster.view.models[site.models[0]].size_bytes
    first_s = median(first for first, _ in short)
    prefill_s = (median(first for first, _ in long) - first_s) / (_LONG - _SHORT)
    step_s = median(step for _, step in short)
    return Profile(
        company=company,
        ssd_bytes_per_s=size_bytes / median(from_disk),
        start_s=median(from_memory),
        exit_s=median(exits),
        overhead_s=max(0.0, first_s - prefill_s * _SHORT),
        prefill_s_per_token=max(1e-6, prefill_s),
        step_s=step_s,
        step_s_per_job=max(0.0, median(step for _, step in both) - step_s),
    )


@contextlib.asynccontextmanager
async def exits_of(site: RealSite) -> AsyncIterator[list[float]]:
    """Note how long each replica is there after its assignment is gone; as `answering` if what is
    known of the cluster can't be followed."""
    found: list[float] = []

    async def watch() -> None:
        since_s: dict[tuple[WorkerId, ModelName], float] = {}
        async for _ in site.cluster.changes():
            view, now_s = site.cluster.view, time.perf_counter()
            for key in view.replicas.keys() - view.assignments.keys() - since_s.keys():
                since_s[key] = now_s
            gone = since_s.keys() - view.replicas.keys()
            found.extend(now_s - since_s.pop(each) for each in gone)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(watch())
        yield found
        task.cancel()


def _starts(site: RealSite, model: ModelName) -> list[StartTimeline]:
    return [
        replica.timeline
        for replica in site.cluster.view.replicas.values()
        if replica.model == model and replica.state is ReplicaState.READY
    ]


async def _two(site: RealSite, model: ModelName) -> tuple[tuple[float, float], ...]:
    return tuple(await asyncio.gather(*(site.probe(model, _SHORT, _TOKENS) for _ in range(2))))


def _scenario(
    site: RealSite, profile: Profile, requests: tuple[Request, ...], shape: Shape
) -> Scenario:
    """Return the cluster as its own records describe it, at the profile's speeds."""
    view = site.cluster.view
    speed = EngineSpeed(
        profile.prefill_s_per_token,
        profile.step_s,
        profile.step_s_per_job,
        start_s=profile.start_s,
    )
    simulated = Site(
        models=tuple(ModelProfile(view.models[name], speed) for name in site.models),
        nodes=tuple(
            NodeProfile(
                node.node_id,
                node.dram_capacity_bytes,
                node.ssd_capacity_bytes,
                profile.ssd_bytes_per_s,
                # Every node has every model on its disk: nothing comes from elsewhere.
                remote_bytes_per_s=profile.ssd_bytes_per_s,
                on_ssd=node.on_ssd or (),
                in_dram=tuple(node.resident),
            )
            for _, node in sorted(view.nodes.items())
        ),
        workers=tuple(
            WorkerProfile(replace(each, address="simulated"))
            for _, each in sorted(view.workers.items())
        ),
        timing=Timing(exit_s=profile.exit_s),
    )
    policy = SchedulerPolicy(keep_alive_s=shape.keep_alive_s)
    return Scenario("calibration", simulated, requests, policy)


def _print(profile: Profile, answers: Sequence[Answer], run: Run) -> None:
    console = Console()
    speeds = ", ".join(f"{name} {value:.4g}" for name, value in asdict(profile).items())
    console.print(f"profile: {speeds}")
    table = Table(box=box.SIMPLE)
    for name in ("of all requests, s", "measured", "simulated", "simulated / measured"):
        table.add_column(name, justify="right")
    real = [each.first_token_s for each in answers]
    simulated = [each.first_token_s + profile.overhead_s for each in run.outcomes]
    whole = [each.total_s for each in answers]
    simulated_whole = [each.total_s + profile.overhead_s for each in run.outcomes]
    for label, ours, theirs in (
        ("first token", simulated, real),
        ("whole answer", simulated_whole, whole),
    ):
        for share in (0.5, 0.9, 0.99):
            predicted, measured = quantile(ours, share), quantile(theirs, share)
            table.add_row(
                f"{label} p{100 * share:g}",
                f"{measured:.2f}",
                f"{predicted:.2f}",
                f"{predicted / measured:.2f}",
            )
    console.print(table)
    console.print(f"{len(answers)} requests, {run.tally.starts} simulated starts")
