"""What has lately come for one model: constant state, advanced by what routers publish.

Concurrency is the jobs that wait or run at all routers. It holds from one record to the next, so
that its average under an exponential window is exact in closed form:

    average(t) = jobs + (average(t0) - jobs) e^(-(t - t0) / window)

A short window sees a burst, a stable one the usual load; Knative's autoscaler has the same two.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gearfall.core.ids import RouterId
from gearfall.core.records import LoadRecord
from gearfall.scheduling.prefetching.forecast import ArrivalHistory, note_arrivals

SHORT_WINDOW_S = 6.0
STABLE_WINDOW_S = 60.0
PEAK_WINDOW_S = 60.0
"""The peak is remembered for one to two of these."""
FRESH_S = 5.0
KEPT_ROUTERS = 256
"""Routers whose totals are remembered for one model, latest heard last."""


@dataclass(frozen=True, slots=True)
class RouterTotals:
    """What one router had counted for the model when it was last heard of."""

    router_id: RouterId
    arrived_jobs: int


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model's load up to `at_unix_s`; the empty one is of a model nothing came for."""

    at_unix_s: float = 0.0
    """When it was last advanced; 0 before the first record."""
    jobs: int = 0
    """Waiting or running, as of the records it was advanced with."""
    short_jobs: float = 0.0
    stable_jobs: float = 0.0
    """Averages of `jobs` over the two windows."""
    peak_since_unix_s: float = 0.0
    """When the present peak window began."""
    peak_jobs: float = 0.0
    """Largest short average in it."""
    peak_jobs_before: float = 0.0
    """And in the window before it."""
    arrived_jobs: int = 0
    """Total over all routers, since this load is kept."""
    routers: tuple[RouterTotals, ...] = ()
    arrivals: ArrivalHistory = field(default_factory=ArrivalHistory)
    """When they came, for the forecast."""

    @property
    def is_known(self) -> bool:
        """Whether any router has ever said something."""
        return self.at_unix_s > 0.0


def short_jobs(load: ModelLoad, now_unix_s: float) -> float:
    """Return the short average at a time that is no earlier than the load's."""
    return _averaged(load.short_jobs, load.jobs, now_unix_s - load.at_unix_s, SHORT_WINDOW_S)


def stable_jobs(load: ModelLoad, now_unix_s: float) -> float:
    """Return the stable average at a time that is no earlier than the load's."""
    return _averaged(load.stable_jobs, load.jobs, now_unix_s - load.at_unix_s, STABLE_WINDOW_S)


def peak_jobs(load: ModelLoad, now_unix_s: float) -> float:
    """Return the largest short average of the last one to two peak windows."""
    _, newest, before = _peaks(load, now_unix_s)
    return max(newest, before)


def peak_changes_at(load: ModelLoad, now_unix_s: float) -> float | None:
    """Return when the peak may sink though nothing comes; None when it has nowhere to sink."""
    since_unix_s, newest, before = _peaks(load, now_unix_s)
    if max(newest, before) <= load.jobs:
        return None
    return since_unix_s + PEAK_WINDOW_S


def stable_below_at(load: ModelLoad, jobs: float, now_unix_s: float) -> float | None:
    """Return when the stable average comes down to `jobs` if nothing changes; None for never."""
    average = stable_jobs(load, now_unix_s)
    if average <= jobs:
        return now_unix_s
    if load.jobs >= jobs:
        return None
    return now_unix_s + STABLE_WINDOW_S * math.log((average - load.jobs) / (jobs - load.jobs))


def advance_load(load: ModelLoad, records: Iterable[LoadRecord], now_unix_s: float) -> ModelLoad:
    """Return the load at `now_unix_s`; `records` are the model's present ones, of all routers.

    A router that is seen for the first time may have counted for days: of its total only what is
    unfinished counts as arrived, and one job if it has just said something. One that counts less
    than before began anew.
    """
    records = tuple(records)
    if not records and not load.is_known:
        return load
    now_unix_s = max(now_unix_s, load.at_unix_s)
    arrived, routers = _arrivals(load, records, now_unix_s)
    since_unix_s, newest, before = _peaks(load, now_unix_s)
    jobs = sum(max(0, record.unfinished_jobs) for record in records)
    if not load.is_known:
        # Jobs that came and went before: it was so busy all along, as far as one can know.
        has_history = any(record.arrived_jobs > record.unfinished_jobs for record in records)
        average = float(jobs) if has_history else 0.0
        return ModelLoad(
            now_unix_s,
            jobs,
            short_jobs=average,
            stable_jobs=average,
            peak_since_unix_s=now_unix_s,
            peak_jobs=average,
            arrived_jobs=arrived,
            routers=routers,
            arrivals=_noted(load, arrived, records),
        )
    return replace(
        load,
        at_unix_s=now_unix_s,
        jobs=jobs,
        short_jobs=short_jobs(load, now_unix_s),
        stable_jobs=stable_jobs(load, now_unix_s),
        peak_since_unix_s=since_unix_s,
        peak_jobs=newest,
        peak_jobs_before=before,
        arrived_jobs=load.arrived_jobs + arrived,
        routers=routers,
        arrivals=_noted(load, arrived, records),
    )


def _averaged(average: float, jobs: float, elapsed_s: float, window_s: float) -> float:
    return jobs + (average - jobs) * math.exp(-max(0.0, elapsed_s) / window_s)


def _peaks(load: ModelLoad, now_unix_s: float) -> tuple[float, float, float]:
    """Return (begin of the present peak window, its peak, the peak of the window before)."""
    passed = math.floor((now_unix_s - load.peak_since_unix_s) / PEAK_WINDOW_S)
    since_unix_s = load.peak_since_unix_s + max(0, passed) * PEAK_WINDOW_S
    newest = _largest(load, since_unix_s, now_unix_s)
    if passed < 1:
        return since_unix_s, max(load.peak_jobs, newest), load.peak_jobs_before
    before = _largest(load, since_unix_s - PEAK_WINDOW_S, since_unix_s)
    return since_unix_s, newest, max(load.peak_jobs, before) if passed == 1 else before


def _largest(load: ModelLoad, from_unix_s: float, to_unix_s: float) -> float:
    """Return the largest short average in a span, which moves one way only between records."""
    begin_unix_s, end_unix_s = max(from_unix_s, load.at_unix_s), max(to_unix_s, load.at_unix_s)
    return max(short_jobs(load, begin_unix_s), short_jobs(load, end_unix_s))


def _arrivals(
    load: ModelLoad, records: tuple[LoadRecord, ...], now_unix_s: float
) -> tuple[int, tuple[RouterTotals, ...]]:
    """Return how many jobs came since the last time, and the totals to count on from."""
    known = {each.router_id: each for each in load.routers}
    arrived = 0
    for record in records:
        last = known.pop(record.router_id, None)
        if last is None or record.arrived_jobs < last.arrived_jobs:
            is_fresh = now_unix_s - record.at_unix_s <= FRESH_S
            arrived += min(max(is_fresh, record.unfinished_jobs), max(0, record.arrived_jobs))
        else:
            arrived += record.arrived_jobs - last.arrived_jobs
        known[record.router_id] = RouterTotals(record.router_id, record.arrived_jobs)
    return arrived, tuple(known.values())[-KEPT_ROUTERS:]


def _noted(load: ModelLoad, arrived: int, records: tuple[LoadRecord, ...]) -> ArrivalHistory:
    if not arrived:
        return load.arrivals
    return note_arrivals(load.arrivals, arrived, max(record.at_unix_s for record in records))
