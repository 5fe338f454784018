"""The scheduler's Prometheus metrics, in a registry of its own."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from gearfall.scheduling.estimates.start_costs import StartCosts, StartOutcome, error_quantile

DECISIONS = ("start", "stop", "keep", "wait")
_DECISION_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_START_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ERRORS = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)
_TIERS = (Tier.REMOTE, Tier.SSD, Tier.DRAM)
_QUANTILES = (0.5, 0.95)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4, 10)


@dataclass(frozen=True, slots=True)
class SchedulerFigures:
    """What the scheduler sees at the moment of a scrape."""

    is_leader: bool
    fence_revision: int
    """0 unless it leads."""
    reachable_workers: int
    unreachable_workers: int
    waiting_jobs: Mapping[ModelName, int]
    """At any router, by model; only models that somebody waits for."""
    costs: StartCosts
    """What starts have taught, with the last ones' errors."""


class SchedulerMetrics:
    """Counters and histograms of what this scheduler decided while it led."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._decisions = Counter(
            "gearfall_scheduler_decisions", "Decisions by kind", ["decision"], registry=registry
        )
        for decision in DECISIONS:
            # Present from the first scrape on, so that a rate sees the first one.
            self._decisions.labels(decision)
        self._placement_s = Histogram(
            "gearfall_scheduler_placement_seconds",
            "From a snapshot of the cluster to the decisions made from it",
            buckets=_DECISION_SECONDS,
            registry=registry,
        )
        self._start_s = Histogram(
            "gearfall_scheduler_start_seconds",
            "Recorded starts, assignment to readiness",
            ["model"],
            buckets=_START_SECONDS,
            registry=registry,
        )
        self._ratio = Histogram(
            "gearfall_scheduler_start_predicted_to_real",
            "Predicted over real seconds of each recorded start: 1 is right, below it too hopeful",
            buckets=_RATIOS,
            registry=registry,
        )
        self._error = Histogram(
            "gearfall_scheduler_start_error",
            "|predicted - real| / real of each recorded start, by the tier its bytes were in",
            ["from_tier"],
            buckets=_ERRORS,
            registry=registry,
        )
        self._recent_error = Gauge(
            "gearfall_scheduler_start_prediction_error",
            "Quantiles of |predicted - real| / real over recent starts; NaN before any",
            ["from_tier", "quantile"],
            registry=registry,
        )
        self._leader = Gauge("gearfall_scheduler_leader", "1 while it leads", registry=registry)
        self._fence = Gauge(
            "gearfall_scheduler_fence_revision",
            "Election revision that its writes carry, 0 unless it leads",
            registry=registry,
        )
        self._workers = Gauge(
            "gearfall_scheduler_workers", "Live workers", ["reach"], registry=registry
        )
        self._waiting = Gauge(
            "gearfall_scheduler_waiting_jobs",
            "Jobs that wait without a replica that takes them",
            ["model"],
            registry=registry,
        )

    def count_decision(self, decision: str) -> None:
        """Take one written decision in."""
        self._decisions.labels(decision).inc()

    def observe_placement(self, seconds: float) -> None:
        """Take the time of one decision step in."""
        self._placement_s.observe(seconds)

    def observe_start(self, outcome: StartOutcome) -> None:
        """Take one recorded start in."""
        self._start_s.labels(outcome.model).observe(outcome.measured_s)
        if outcome.measured_s > 0:
            self._ratio.observe(outcome.predicted_s / outcome.measured_s)
            self._error.labels(outcome.from_tier.value).observe(outcome.error)

    def render(self, figures: SchedulerFigures) -> bytes:
        """Return the exposition text."""
        self._leader.set(figures.is_leader)
        self._fence.set(figures.fence_revision)
        self._workers.labels("reachable").set(figures.reachable_workers)
        self._workers.labels("unreachable").set(figures.unreachable_workers)
        for tier, quantile in product(_TIERS, _QUANTILES):
            error = error_quantile(figures.costs, quantile, tier)
            gauge = self._recent_error.labels(tier.value, str(quantile))
            gauge.set(math.nan if error is None else error)
        self._waiting.clear()
        for model, jobs in figures.waiting_jobs.items():
            self._waiting.labels(model).set(jobs)
        return generate_latest(self._registry)
