"""Which gear is in force: up at once, down after a while and only when little waits.

| what is seen                                        | what follows                              |
| --------------------------------------------------- | ----------------------------------------- |
| the load's gear is above the one in force           | shift up to it now                        |
| keys and values fill more than `kv_high` of memory  | one gear above the one in force, now, and |
|                                                     | the next only after `kv_settle_s`         |
| the load's gear is below, for `dwell_s` in a row    | shift down to the highest it was meanwhile |
| and more than `short_queue_s` of work waits          | the dwell begins anew                     |
| anything else                                       | stay                                      |

Load: tokens a second that arrive, smoothed, and what waits, as if it had to be gone in `clear_s`.
A lasting change of the rate is followed faster: while one of two one-sided sums of what the
smoothed rate missed (CUSUM, Page 1954) is past its limit, new samples weigh more. CascadeServe
(arXiv 2406.14424) shifts on the measured load; here what waits counts too, so that a burst does
before its rate is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gearfall.core.gears.gear_plan import Gear, gear_for

MIN_AGE_S = 1e-3
"""Samples nearer to each other than this say nothing about a rate."""


@dataclass(frozen=True, slots=True)
class ShiftPolicy:
    """What an operator may set."""

    smoothing_s: float = 3.0
    """Time constant of the rate's moving average."""
    dwell_s: float = 10.0
    """Load must have been lower for so long before the gear goes down."""
    clear_s: float = 2.0
    """Waiting work counts as load that would clear it in this time."""
    short_queue_s: float = 0.25
    """Waiting work, over the gear's highest load, with which the gear may still go down."""
    kv_high: float = 0.92
    """Share of memory for keys and values from which on a higher gear is wanted."""
    kv_settle_s: float = 3.0
    """How long a shift for full memory has to show its effect, before it is done again."""
    slack: float = 0.25
    """Relative miss of the smoothed rate that is no change."""
    limit: float = 0.25
    """Sum of relative misses, in smoothing times, that is one."""
    hurry: float = 8.0
    """How much more a sample weighs during a change."""


@dataclass(frozen=True, slots=True)
class LoadSample:
    """What all routers see at one moment."""

    at_s: float
    arrived_tokens: float
    """Since the sample before: prompts, and answers as long as they may become."""
    queued_tokens: float
    """Prompt and answer tokens of jobs that no worker has."""
    kv_share: float = 0.0
    """Of the fullest replica's memory for keys and values."""


@dataclass(frozen=True, slots=True)
class GearState:
    """The gear in force and what the rule remembers."""

    gear: int
    at_s: float
    rate: float = 0.0
    """Smoothed tokens a second."""
    above: float = 0.0
    below: float = 0.0
    """Sums of the rate's misses."""
    lower_since_s: float | None = None
    highest_since: int = 0
    """Highest gear that the load wanted since then."""
    kv_shift_s: float = -math.inf
    """When memory last shifted it up."""


def load_of(state: GearState, sample: LoadSample, policy: ShiftPolicy) -> float:
    """Return the load in tokens a second that gears are chosen by."""
    return state.rate + sample.queued_tokens / policy.clear_s


def shift(
    state: GearState, sample: LoadSample, gears: Sequence[Gear], policy: ShiftPolicy
) -> GearState:
    """Return the state after one more sample."""
    rate, above, below = _followed(state, sample, policy)
    gear, at_s = min(state.gear, len(gears) - 1), max(state.at_s, sample.at_s)
    seen = GearState(gear, at_s, rate, above, below, kv_shift_s=state.kv_shift_s)
    wanted = gear_for(gears, load_of(seen, sample, policy))
    if sample.kv_share > policy.kv_high and wanted <= gear:
        return _up_for_memory(seen, len(gears) - 1, policy)
    if wanted >= gear:
        return _at(seen, wanted)
    waiting_s = sample.queued_tokens / gears[seen.gear].max_load
    since_s = state.lower_since_s
    if since_s is None or waiting_s > policy.short_queue_s:
        return _dwelling(seen, seen.at_s, wanted)
    highest = max(wanted, state.highest_since)
    if seen.at_s - since_s >= policy.dwell_s:
        return _at(seen, highest)
    return _dwelling(seen, since_s, highest)


def _followed(
    state: GearState, sample: LoadSample, policy: ShiftPolicy
) -> tuple[float, float, float]:
    """Return the smoothed rate and the two sums after a sample."""
    age_s = sample.at_s - state.at_s
    if age_s < MIN_AGE_S:
        return state.rate, state.above, state.below
    now = sample.arrived_tokens / age_s
    weight = age_s / (policy.smoothing_s + age_s)
    scale = max(state.rate, now, 1e-9)
    miss = (now - state.rate) / scale
    above = min(max(0.0, state.above + (miss - policy.slack) * weight), 2 * policy.limit)
    below = min(max(0.0, state.below + (-miss - policy.slack) * weight), 2 * policy.limit)
    if max(above, below) > policy.limit:
        weight = min(1.0, policy.hurry * weight)
    return state.rate + weight * (now - state.rate), above, below


def _up_for_memory(seen: GearState, highest: int, policy: ShiftPolicy) -> GearState:
    """One gear up, or, while the shift before has not had its time, none."""
    if seen.gear == highest or seen.at_s < seen.kv_shift_s + policy.kv_settle_s:
        return seen
    return replace(seen, gear=seen.gear + 1, kv_shift_s=seen.at_s)


def _at(seen: GearState, gear: int) -> GearState:
    return GearState(gear, seen.at_s, seen.rate, seen.above, seen.below, kv_shift_s=seen.kv_shift_s)


def _dwelling(seen: GearState, since_s: float, highest: int) -> GearState:
    return GearState(
        *(seen.gear, seen.at_s, seen.rate, seen.above, seen.below),
        lower_since_s=since_s,
        highest_since=highest,
        kv_shift_s=seen.kv_shift_s,
    )
