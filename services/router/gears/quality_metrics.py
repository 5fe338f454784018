"""What is measured about the quality of answers over time and about answers that are kept."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

_STAGE = ["model", "cascade", "stage"]


class QualityMetrics:
    """`model` is the deployment, `cascade` its stages with the planned thresholds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.decisions = Counter(
            "gearfall_gear_decisions",
            "Answers of lower stages by outcome: up, or accepted",
            [*_STAGE, "outcome"],
            registry=registry,
        )
        self.shadow = Counter(
            "gearfall_shadow_answers",
            "Accepted answers that were to be compared with the last stage's, by outcome",
            [*_STAGE, "outcome"],
            registry=registry,
        )
        self.shadow_tokens = Counter(
            "gearfall_shadow_tokens",
            "Tokens of comparisons, which no client is billed for",
            ["model", "kind"],
            registry=registry,
        )
        self.shadow_cost_flops = Counter(
            "gearfall_shadow_cost_flops",
            "Of comparisons, failed ones too",
            ["model"],
            registry=registry,
        )
        self.shadow_device_s = Counter(
            "gearfall_shadow_device_seconds",
            "Of comparisons, failed ones too",
            ["model"],
            registry=registry,
        )
        self.promised = Gauge(
            "gearfall_gear_promised",
            "Share that the plan promises",
            [*_STAGE, "promise"],
            registry=registry,
        )
        self.evidence = Gauge(
            "gearfall_drift_evidence",
            "Against a promise: it is false at 1 in that many answers or more seldom",
            [*_STAGE, "promise"],
            registry=registry,
        )
        self.alarms = Counter(
            "gearfall_drift_alarms",
            "Promises that no longer held",
            [*_STAGE, "promise"],
            registry=registry,
        )
        self.tightened = Gauge(
            "gearfall_gear_threshold",
            "In force, for cascades whose thresholds were raised",
            _STAGE,
            registry=registry,
        )

    def forget(self, deployment: str) -> None:
        """Show nothing more of the cascades of a plan that is gone."""
        counters = (self.decisions, self.shadow, self.alarms)
        for metric in (self.promised, self.evidence, self.tightened, *counters):
            metric.remove_by_labels({"model": deployment})


class CacheMetrics:
    """Of the answer cache; `model` is the deployment."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "gearfall_answer_cache_requests",
            "Requests whose answer may be kept: hit, joined (computed for another one), miss",
            ["model", "outcome"],
            registry=registry,
        )
        self.spared_flops = Counter(
            "gearfall_answer_cache_spared_flops",
            "That answers given again did not cost",
            ["model"],
            registry=registry,
        )
        self._bytes = Gauge(
            "gearfall_answer_cache_bytes", "Used by kept answers", ["model"], registry=registry
        )
        self._answers = Gauge("gearfall_answer_cache_answers", "Kept", ["model"], registry=registry)
        self._evictions = Gauge(
            "gearfall_answer_cache_evictions",
            "Answers that left for others so far",
            ["model"],
            registry=registry,
        )

    def show(self, sizes: Mapping[str, tuple[int, int, int]]) -> None:
        """Set the gauges: by deployment, bytes, answers and evictions."""
        for gauge in (self._bytes, self._answers, self._evictions):
            gauge.clear()
        for name, (used_bytes, answers, evictions) in sizes.items():
            self._bytes.labels(name).set(used_bytes)
            self._answers.labels(name).set(answers)
            self._evictions.labels(name).set(evictions)
