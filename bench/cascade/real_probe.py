"""How fast a cluster is at the moment: a short, fixed piece of what the profiler measures.

A machine's clock and its neighbours change between a profile and a run. What is asked here are
made-up prompts, on all replicas at once, before the requests of a run come: so what is predicted
at this pace knows nothing of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from bench.cascade.real_prediction import DEVICE
from gearfall.client import AsyncClient
from gearfall.core.profile import Profile, Speed
from gearfall.profiling.speed import Served, SpeedSettings, time_beside_device, time_step
from gearfall.simulation.cascades.profile_plan import served_on

BATCHES = (1, 4)
"""Streams at once on each replica."""
REPEATS = 3
JOBS = 6
"""Of one token, one after the other."""
_SETTINGS = SpeedSettings(BATCHES, step_tokens=16, prompts=(), repeats=REPEATS)


@dataclass(frozen=True, slots=True)
class Pace:
    """What things take now over what they took when they were profiled."""

    steps: float
    way: float
    """All of a job that is not its steps."""


PROFILED = Pace(1.0, 1.0)


async def probe(client: AsyncClient, profile: Profile, replicas: int) -> Pace:
    """Measure; `replicas` of every model are ready, and nobody asks for them."""
    facts = {each.name: each for each in (await client.models()).models}
    steps: list[float] = []
    ways: list[float] = []
    for model in profile.models:
        known = served_on(model, {DEVICE})[DEVICE].speed
        served = Served(facts[model.name], replicas, model.slots)
        seen = {
            batch: [await time_step(client, served, batch, _SETTINGS) for _ in range(REPEATS)]
            for batch in BATCHES
        }
        steps += [each / known.step_s(batch) for batch in BATCHES for each in seen[batch]]
        way_s = await time_beside_device(client, served, JOBS) - known.tell_s
        if (known_s := known.request_s + known.job_s) > 0:
            ways.append(max(0.0, way_s) / known_s)
    return pace_of(steps, ways)


def pace_of(steps: Sequence[float], ways: Sequence[float]) -> Pace:
    """Return the medians: a moment of something else on one core moves nothing."""
    return Pace(median(steps), median(ways) if ways else 1.0)


def at_pace(profile: Profile, pace: Pace) -> Profile:
    """Return the profile as it would have been measured at that pace."""
    models = tuple(
        replace(model, speeds={name: _at(speed, pace) for name, speed in model.speeds.items()})
        for model in profile.models
    )
    return replace(profile, models=models)


def _at(speed: Speed, pace: Pace) -> Speed:
    return Speed(
        prefill_s_per_token=speed.prefill_s_per_token * pace.steps,
        step_s=speed.step_s * pace.steps,
        step_s_per_job=speed.step_s_per_job * pace.steps,
        steps=tuple((jobs, seconds * pace.steps) for jobs, seconds in speed.steps),
        job_s=speed.job_s * pace.way,
        request_s=speed.request_s * pace.way,
        wake_s=speed.wake_s * pace.way,
        tell_s=speed.tell_s * pace.steps,
    )
