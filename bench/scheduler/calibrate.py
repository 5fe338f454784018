"""The simulator against a real cluster on one trace: `python -m bench.scheduler calibrate`.

The real one is that of `bench.scheduler real` under our policy. Its profile is measured there:
bandwidths, starts and steps as its own records tell them, prompts and steps by requests of their
own. Then the same trace runs in a simulated cluster of that profile; no number of the trace itself
goes into the profile.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import machine_facts, our_versions
from bench.scheduler.real import add_trace_flags, shape_of, teach, trace_of
from bench.scheduler.real_cluster import Answer, RealSite, Shape, running_real_site
from gearfall.client import TextDelta
from gearfall.core.ids import ModelName
from gearfall.core.records import ReplicaState, StartTimeline, Tier
from gearfall.scheduling.autoscaler import SchedulerPolicy
from gearfall.simulation.figures import quantile
from gearfall.simulation.requests import Request
from gearfall.simulation.scenario import Run, Scenario, simulate
from gearfall.simulation.site import EngineSpeed, ModelProfile, NodeProfile, Site, WorkerProfile

RESULTS = Path(__file__).parents[1] / "results" / "scheduler_calibrate.json"
_PROBES = 3
_SHORT, _LONG, _TOKENS = 8, 264, 33
_WORDS = itertools.count(7)


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of the real cluster before the trace."""

    ssd_bytes_per_s: float
    start_s: float
    """Of a start from memory."""
    overhead_s: float
    """From the client's sending to the first token, beside the prompt's computation."""
    prefill_s_per_token: float
    step_s: float
    step_s_per_job: float


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, simulate, print both, write JSON."""
    parser = argparse.ArgumentParser(prog="bench.scheduler calibrate", description=__doc__)
    add_trace_flags(parser)
    parser.set_defaults(duration=60.0)
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
    home, shape = settings.directory or scratch, shape_of(settings)
    async with running_real_site(home, scratch, shape) as site:
        await teach(site)
        profile = await _profile(site)
        requests = trace_of(settings, site.models)
        scenario = _scenario(site, profile, requests, shape)
        async with site.scheduled_by("ours"):
            answers = await site.replay(requests)
    return profile, scenario, answers


async def _profile(site: RealSite) -> Profile:
    """Start models from disk and from memory, and time prompts and steps on a warm one."""
    async with site.scheduled_by("ours"):
        starts: list[StartTimeline] = []
        for model in (*site.models, *site.models):
            await _answer(site, model, _SHORT, 2)
            starts += _starts(site, model)
        warm = site.models[-1]
        short = [await _answer(site, warm, _SHORT, _TOKENS) for _ in range(_PROBES)]
        long = [await _answer(site, warm, _LONG, 2) for _ in range(_PROBES)]
        both = [each for _ in range(_PROBES) for each in await _two(site, warm)]
        await site.empty()
    from_disk = [each.ssd_s for each in starts if each.from_tier is Tier.SSD and each.ssd_s > 0]
    from_memory = [each.total_s for each in starts if each.from_tier is Tier.DRAM]
    size_bytes = site.cluster.view.models[site.models[0]].size_bytes
    first_s = median(first for first, _ in short)
    prefill_s = (median(first for first, _ in long) - first_s) / (_LONG - _SHORT)
    step_s = median(step for _, step in short)
    return Profile(
        ssd_bytes_per_s=size_bytes / median(from_disk),
        start_s=median(from_memory),
        overhead_s=max(0.0, first_s - prefill_s * _SHORT),
        prefill_s_per_token=max(1e-6, prefill_s),
        step_s=step_s,
        step_s_per_job=max(0.0, median(step for _, step in both) - step_s),
    )


def _starts(site: RealSite, model: ModelName) -> list[StartTimeline]:
    return [
        replica.timeline
        for replica in site.cluster.view.replicas.values()
        if replica.model == model and replica.state is ReplicaState.READY
    ]


async def _two(site: RealSite, model: ModelName) -> tuple[tuple[float, float], ...]:
    one, other = (_answer(site, model, _SHORT, _TOKENS) for _ in range(2))
    return tuple(await asyncio.gather(one, other))


async def _answer(
    site: RealSite, model: ModelName, prompt_tokens: int, tokens: int
) -> tuple[float, float]:
    """Return seconds to the first token and from one token to the next."""
    # No prompt twice: what was computed for one before is kept and found again.
    prompt = [next(_WORDS) % 30_000 for _ in range(prompt_tokens)]
    sent_s = time.perf_counter()
    times_s: list[float] = []
    events = site.client.stream(
        model,
        prompt,
        max_tokens=tokens,
        temperature=0.0,
        ignore_eos=True,
        logprobs=True,
    )
    async for event in events:
        if isinstance(event, TextDelta):
            times_s += [time.perf_counter() - sent_s] * len(event.logprobs or ())
    return times_s[0], (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)


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
            )
            for _, node in sorted(view.nodes.items())
        ),
        workers=tuple(
            WorkerProfile(replace(each, address="simulated"))
            for _, each in sorted(view.workers.items())
        ),
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
