"""The router's Prometheus metrics, in a registry of its own."""

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from services.router.cost_metrics import CostMetrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class RouterMetrics:
    """Counters and histograms; `model` is what the client asked for, `stage` a model that ran."""

    def __init__(self) -> None:
        # They double the series and say nothing that a counter's reset does not. The library knows
        # this setting for the whole process only.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.registry = self._registry
        """For parts that have metrics of their own."""
        self.requests = Counter(
            "gearfall_requests",
            "Requests by outcome",
            ["model", "outcome"],
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "gearfall_time_to_first_token_seconds",
            "From admission to the first released text",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration_s = Histogram(
            "gearfall_request_duration_seconds",
            "From admission to the end",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.tokens = Counter(
            "gearfall_tokens", "Tokens by kind", ["model", "kind"], registry=self._registry
        )
        self.stage_answers = Counter(
            "gearfall_stage_answers",
            "Answers released",
            ["model", "stage"],
            registry=self._registry,
        )
        self.escalations = Counter(
            "gearfall_escalations",
            "Stages left for the next one",
            ["model", "stage"],
            registry=self._registry,
        )
        self.early_stops = Counter(
            "gearfall_early_stops",
            "Drafts stopped in the middle because they would have gone up anyway",
            ["model", "stage"],
            registry=self._registry,
        )
        self.spared_tokens = Counter(
            "gearfall_spared_tokens",
            "That the drafts stopped early might still have produced, at most",
            ["model", "stage"],
            registry=self._registry,
        )
        self.drafts_replaced = Counter(
            "gearfall_drafts_replaced",
            "Drafts that a client had and that another stage's answer replaced",
            ["model", "stage"],
            registry=self._registry,
        )
        self.draft_tokens = Counter(
            "gearfall_draft_tokens",
            "Tokens of lower stages' answers that a stage's model verified",
            ["model", "stage", "outcome"],
            registry=self._registry,
        )
        self.epochs_bumped = Counter(
            "gearfall_epochs_bumped", "Jobs that lost an owner", ["stage"], registry=self._registry
        )
        self.entries_restored = Counter(
            "gearfall_entries_restored",
            "Queue entries that were lost and appended again",
            registry=self._registry,
        )
        self.costs = CostMetrics(self._registry)
        self._queue_depth = Gauge(
            "gearfall_queue_depth", "Queue entries", ["model", "state"], registry=self._registry
        )
        self._gear = self._by_deployment("gearfall_gear", "Gear in force, 0 the lowest load's")
        self._gear_version = self._by_deployment("gearfall_gear_plan_version", "Plan followed")
        self._gear_shifts = self._by_deployment(
            "gearfall_gear_shifts", "Times this router wanted another gear, since the plan came"
        )
        self._running = Gauge(
            "gearfall_running_choices", "Answers being generated", registry=self._registry
        )

        self._reachable = Gauge(
            "gearfall_reachable",
            "1 if etcd answered (state), took a write (writes), Redis answered (queue) just now",
            ["part"],
            registry=self._registry,
        )

    def show_reachable(self, parts: Mapping[str, bool]) -> None:
        """Set which of the parts that a router needs answer it."""
        for part, answers in parts.items():
            self._reachable.labels(part).set(answers)

    def _by_deployment(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, ["model"], registry=self._registry)

    def render(
        self,
        running_choices: int,
        depths: Mapping[str, tuple[int, int]],
        gears: Mapping[str, tuple[int, int, int]],
    ) -> bytes:
        """Return the exposition text.

        `depths`: model to entries waiting and claimed. `gears`: deployment to plan version, gear in
        force, and how often this router has wanted another one.
        """
        self._running.set(running_choices)
        self.costs.refresh()
        for gauge in (self._gear, self._gear_version, self._gear_shifts):
            gauge.clear()
        for deployment, (version, gear, shifts) in gears.items():
            self._gear_version.labels(deployment).set(version)
            self._gear.labels(deployment).set(gear)
            self._gear_shifts.labels(deployment).set(shifts)
        self._queue_depth.clear()
        for model, (waiting, claimed) in depths.items():
            self._queue_depth.labels(model, "waiting").set(waiting)
            self._queue_depth.labels(model, "claimed").set(claimed)
        return generate_latest(self._registry)
