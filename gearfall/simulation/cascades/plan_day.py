"""A plan at work in simulated time: load, gear in force, latency and quality, moment by moment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.gears.gear_plan_checks import counting_of
from gearfall.core.gears.gear_shift import ShiftPolicy
from gearfall.core.ids import ModelName
from gearfall.core.profile import Profile
from gearfall.gears.placement import Host
from gearfall.gears.profile_answers import beginnings
from gearfall.simulation.arrivals import gamma_times
from gearfall.simulation.cascades.cascade_outcomes import Answered, Arrival, CascadeRun
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.profile_plan import mean_tokens, queries_of, served_on
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.fleet.figures import quantile

DAY_S = 240.0
"""Simulated: long beside the time that gears wait before they go down."""
MIN_REQUESTS, MAX_REQUESTS = 1000, 30_000
_TROUGH, _PEAK = 0.2, 1.1
"""Of the highest planned load: where a made-up day begins and ends, and its noon."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A short while of the run; requests count where they came."""

    at_s: float
    load: float
    """Tokens a second that came, prompts and the first model's answers."""
    gear: int
    """In force at its end."""
    p95_s: float | None
    """Of whole answers; None where nothing came."""
    quality: float | None


def made_up_day(plan: GearPlan, profile: Profile, *, cv: float, seed: int = 0) -> list[float]:
    """Return arrival times of a day that rises above the highest planned load and falls again."""
    per_s = _requests_per_s(plan, profile)
    mean = _TROUGH + (_PEAK - _TROUGH) / 2
    count = _count(per_s * mean)
    length_s = count / (per_s * mean)
    generator = np.random.default_rng(seed)
    even = gamma_times(generator, per_s=1.0, cv=cv, duration_s=float(count))
    hours = np.linspace(0.0, 1.0, 2001)
    rate = _TROUGH + (_PEAK - _TROUGH) * np.sin(np.pi * hours) ** 2
    passed = np.concatenate([[0.0], np.cumsum((rate[1:] + rate[:-1]) / 2)])
    shares = np.interp(np.array(even) / count, passed / passed[-1], hours)
    return [float(each) for each in shares * length_s]


def scaled_trace(plan: GearPlan, profile: Profile, times_s: Sequence[float]) -> list[float]:
    """Return a trace's first arrivals, its clock run so that they bring half the highest load."""
    per_s = _requests_per_s(plan, profile) / 2
    kept = list(times_s[: _count(per_s)])
    span_s = (kept[-1] - kept[0]) or 1.0
    wanted_s = len(kept) / per_s
    return [(each - kept[0]) * wanted_s / span_s for each in kept]


def run_day(
    plan: GearPlan,
    profile: Profile,
    hosts: Mapping[Host, str],
    times_s: Sequence[float],
    *,
    seed: int = 0,
) -> CascadeRun:
    """Replay arrivals of the profile's queries on the plan's replicas, gears shifting as online."""
    judged = beginnings(profile, plan.hold_tokens)
    several = next(iter(counting_of(plan)), None)
    queries = queries_of(judged, plan.calibrations, plan.certainty, several=several)
    drawn = np.random.default_rng(seed).integers(0, len(queries), len(times_s))
    arrivals = [Arrival(at, int(query)) for at, query in zip(times_s, drawn, strict=True)]
    replicas = _replicas(plan, profile, hosts)
    return run_cascades(
        replicas,
        queries,
        arrivals,
        plan.gears,
        policy=ShiftPolicy(),
        hold_tokens=plan.hold_tokens,
    )


def moments(
    run: CascadeRun, plan: GearPlan, profile: Profile, count: int = 80
) -> tuple[Moment, ...]:
    """Return the run in so many pieces of one length."""
    answered = sorted(run.answered, key=lambda each: each.at_s)
    long_s = (answered[-1].at_s or 1.0) / count
    tokens = mean_tokens(profile.model(plan.gears[0].stages[0].model))
    pieces: list[list[Answered]] = [[] for _ in range(count)]
    for each in answered:
        pieces[min(int(each.at_s / long_s), count - 1)].append(each)
    return tuple(
        Moment(
            at * long_s,
            len(piece) * tokens / long_s,
            [gear for when, gear in run.shifts if when <= (at + 1) * long_s][-1],
            quantile([each.total_s for each in piece], 0.95) if piece else None,
            math.fsum(each.quality for each in piece) / len(piece) if piece else None,
        )
        for at, piece in enumerate(pieces)
    )


def _count(per_s: float) -> int:
    return int(min(max(per_s * DAY_S, MIN_REQUESTS), MAX_REQUESTS))


def _requests_per_s(plan: GearPlan, profile: Profile) -> float:
    first = profile.model(plan.gears[0].stages[0].model)
    return plan.gears[-1].max_load / mean_tokens(first)


def _replicas(plan: GearPlan, profile: Profile, hosts: Mapping[Host, str]) -> list[FixedReplica]:
    """Return the placed replicas, each model's on different workers of its node."""
    found = []
    for placed in plan.placement:
        there = sorted(
            (host.name, kind) for host, kind in hosts.items() if host.node == placed.node
        )
        for worker, kind in there[: placed.count]:
            served = served_on(profile.model(placed.model), {kind})[kind]
            found.append(
                FixedReplica(
                    ModelName(placed.model), placed.node, served.speed, served.slots, worker
                )
            )
    return found
