"""What a simulation is judged by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from gearfall.simulation.fleet.scenario import Run


@dataclass(frozen=True, slots=True)
class Figures:
    """One policy's run in numbers. Times in seconds, of all finished stages of requests."""

    policy: str
    arrived: int
    finished: int
    startup_p50_s: float
    startup_p99_s: float
    """From arrival until a ready replica took it."""
    waited_p50_s: float
    waited_p99_s: float
    """The same, and what it waited after each preemption."""
    first_token_p50_s: float
    first_token_p99_s: float
    total_p99_s: float
    slo_missed: float
    """Share whose first token came later than the objective."""
    preempted: int
    """Requests that were stopped at least once."""
    most_preempted: int
    """How often that happened to the one it happened to most."""
    moved: int
    """Requests that moved alive at least once."""
    starts: int
    start_error_p50: float
    """|predicted - measured| / measured."""
    start_error_p95: float
    remote_bytes: int
    ssd_bytes: int
    device_bytes: int
    prefetched_bytes: int
    accelerator_hours: float
    events: int
    decisions: int


def figures_of(run: Run, slo_s: float) -> Figures:
    """Return a run's figures against an objective for the first token."""
    found, tally = run.outcomes, run.tally
    startup = [each.startup_s for each in found]
    waited = [each.waited_s for each in found]
    first = [each.first_token_s for each in found]
    late = sum(each > slo_s for each in first) + tally.arrived - tally.finished
    return Figures(
        policy=run.policy,
        arrived=tally.arrived,
        finished=tally.finished,
        startup_p50_s=quantile(startup, 0.50),
        startup_p99_s=quantile(startup, 0.99),
        waited_p50_s=quantile(waited, 0.50),
        waited_p99_s=quantile(waited, 0.99),
        first_token_p50_s=quantile(first, 0.50),
        first_token_p99_s=quantile(first, 0.99),
        total_p99_s=quantile((each.total_s for each in found), 0.99),
        slo_missed=late / tally.arrived if tally.arrived else 0.0,
        preempted=sum(each.preemptions > 0 for each in found),
        most_preempted=max((each.preemptions for each in found), default=0),
        moved=sum(each.moves > 0 for each in found),
        starts=tally.starts,
        start_error_p50=quantile(run.start_errors, 0.50),
        start_error_p95=quantile(run.start_errors, 0.95),
        remote_bytes=tally.remote_bytes,
        ssd_bytes=tally.ssd_bytes,
        device_bytes=tally.device_bytes,
        prefetched_bytes=tally.prefetched_bytes,
        accelerator_hours=tally.accelerator_s / 3600.0,
        events=tally.events,
        decisions=tally.decisions,
    )


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that `share` of all do not exceed; 0 of none."""
    ordered: Sequence[float] = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0
